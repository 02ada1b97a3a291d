"""Functions that a user names on the command line as ``module:function``."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steppe.lab.errors import LabError, one_line, reason, unknown

HERE: dict[str, Callable[..., Any]] = {}  # functions of this process that no other can import


def name_of(task: str | Callable[..., Any]) -> str:
    """Return the name by which :func:`imported` finds a function, in this process and, if it can be, in others."""
    if isinstance(task, str):
        return task
    module = task.__module__ or "__main__"
    name = f"{module}:{task.__qualname__}"
    if module == "__main__" or "<" in name:
        name = name.replace("<", "").replace(">", "")
        HERE[name] = task
    return name


def imported(name: str) -> Callable[..., Any]:
    """Return the function called ``module:function``; modules are also looked for in the current folder.

    Raises:
        LabError: the name has another form, or the module cannot be imported, or it has no such function.
    """
    if name in HERE:
        return HERE[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise LabError(f"the function must be named as module:function, got {name!r}")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise LabError(f"module {module!r} cannot be imported: {one_line(error)}") from error
    if not callable(found):
        functions = [key for key, value in vars(sys.modules[module]).items() if callable(value) and key[0] != "_"]
        raise unknown(f"module {module!r} has no function {attribute!r}", attribute, functions)
    return found  # type: ignore[no-any-return]


def called(name: str, *arguments: Any) -> Any:
    """Return what ``module:function`` returns; whatever it raises becomes a ``LabError`` that names it."""
    function = imported(name)
    try:
        return function(*arguments)
    except LabError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise LabError(f"{name} failed: {reason(error)}") from error
