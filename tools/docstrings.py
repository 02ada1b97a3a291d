"""For the site: docstrings with types and defaults, and references as plain names."""

import inspect
import re
from importlib import import_module
from typing import Any

import griffe


class Shown(griffe.Extension):
    """Make every docstring what a reader of the page needs."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that has one."""
        if obj.docstring is None:
            return
        if obj.is_class and obj.path.startswith("steppe.methods."):
            obj.docstring.value = own_arguments(getattr(import_module("steppe.methods"), obj.name))
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r":\w+:`(~?)([\w.]+)`", name, obj.docstring.value)


def own_arguments(method: type) -> str:
    """Return a method's docstring without what all methods share: base, options and errors stand in one place."""
    doc, own = inspect.cleandoc(method.__doc__ or ""), set(inspect.signature(method).parameters) - {"base"}
    doc = re.sub(r"^Raises:\n(?:    .*\n?)*\n*", "", doc, flags=re.MULTILINE)
    doc = re.sub(r", default .*?\):", "):", doc)
    entry = r"^    (\w+) \(.*\n(?:        .*\n)*"
    return re.sub(entry, lambda found: found[0] if found[1] in own else "", doc, flags=re.MULTILINE)


def name(reference: re.Match[str]) -> str:
    """Return a reference's name in code: the last part where it begins with ``~``."""
    return f"`{reference[2].rsplit('.', 1)[-1] if reference[1] else reference[2]}`"
