"""For the site: docstrings as ``help()`` shows them, with their shared arguments, and references as plain names."""

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
            method = getattr(import_module("steppe.methods"), obj.name)
            obj.docstring.value = inspect.cleandoc(method.__doc__ or "")
        obj.docstring.value = re.sub(r":\w+:`(~?)([\w.]+)`", name, obj.docstring.value)


def name(reference: re.Match[str]) -> str:
    """Return a reference's name in code: the last part where it begins with ``~``."""
    return f"`{reference[2].rsplit('.', 1)[-1] if reference[1] else reference[2]}`"
