"""The arguments that all methods share, written into the docstring of each: ``help(steppe.WSAM)`` shows all of them."""

from __future__ import annotations

import inspect
import re
import textwrap

SHARED = {
    "base": "the base optimizer, an instance; it takes one step on the method's ``u``. A list of them is their "
    ":class:`~steppe.Joint`.",
    "rho": "radius of the perturbation, in the norm of the method's ``eps``, or a schedule "
    "(:mod:`steppe.schedule`). A parameter group may have its own.",
}
ALIASES = {
    "Base": "torch.optim.Optimizer | list[torch.optim.Optimizer]",
    "Radius": "float | Schedule",
    "Which": "(Oracle) -> list[bool]",
    "Sync": "str | int",
}
ERRORS = """Raises:
    TypeError, ValueError: an argument has a wrong type or value; the message says what was expected, and nothing
        has been changed."""


def add_shared_arguments(method: type, wrapper: type) -> None:
    """Give a method's docstring every argument, with types and defaults, from the wrapper's docstring.

    Args:
        method: a class whose docstring may have a section ``Args`` that lists its own arguments.
        wrapper: the class that documents the options.
    """
    text, example = _cut(inspect.cleandoc(method.__doc__ or ""), "Example:")
    text, own = _cut(text, "Args:")
    options = [name for name in _parameters(wrapper) if name not in ("base", "rule", "rho", "full")]
    described = _described(_cut(inspect.cleandoc(wrapper.__doc__ or ""), "Args:")[1]) | SHARED | _described(own)
    types = _parameters(wrapper) | _parameters(method)
    names = [name for name in _parameters(method) if name != "options"] + options
    entries = (f"{name} ({types[name]}): {' '.join(described[name].split())}" for name in names)
    lines = [textwrap.fill(entry, 100, initial_indent=" " * 4, subsequent_indent=" " * 8) for entry in entries]
    method.__doc__ = "\n\n".join([text, "Args:\n" + "\n".join(lines), ERRORS, *([example] if example else [])]) + "\n"


def _cut(text: str, heading: str) -> tuple[str, str]:
    before, found, after = text.partition(f"\n{heading}\n")
    return before.rstrip(), f"{heading}\n{after}".rstrip() if found else ""


def _described(section: str) -> dict[str, str]:
    """Return the entries of a section ``Args``, by name."""
    return {name: text.strip() for name, text in re.findall(r"^    (\w+): ((?:.|\n(?=     ))*)", section, re.MULTILINE)}


def _parameters(of: type) -> dict[str, str]:
    """Return the type and the default of every parameter of a class, by name."""
    found = {}
    for name, p in list(inspect.signature(of).parameters.items()):
        default = "" if p.default is p.empty else f", default {p.default!r}"
        found[name] = f"{ALIASES.get(p.annotation, p.annotation)}{default}"
    return found
