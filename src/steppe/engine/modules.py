"""The modules that a plain closure runs, found by looking at what the closure refers to."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

DEPTH = 5  # closure -> compiled function -> function -> trainer -> attribute of the trainer
LARGE = 100  # containers with more items hold data, not models


class Modules:
    """Finds the modules of a closure that hold the optimizer's parameters.

    A plain closure does not name its model. The modules that it calls are found by a forward hook, but compiled code
    and a direct ``module.forward`` run without hooks, and DDP has to be told before its forward. So variables that the
    closure refers to are searched: cells, globals, bound objects and their attributes.

    Args:
        model: the module that closures run, where the user has named it; then nothing is searched.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._known: tuple[object, int] | None = None  # the closure's code and the number of parameters
        self._found: list[weakref.ref[nn.Module]] = []

    def of(self, closure: object, parameters: Sequence[Tensor]) -> Iterator[nn.Module]:
        """Yield every module inside those that the closure refers to and that hold any of the parameters."""
        if self._model is not None:
            yield from self._model.modules()
            return
        known = getattr(closure, "__code__", None), len(parameters)
        if self._known != known or not self._found or any(module() is None for module in self._found):
            self._known, self._found = known, [weakref.ref(module) for module in referred(closure, parameters)]
        for reference in self._found:
            module = reference()
            if module is not None:
                yield from module.modules()

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_known": None, "_found": []}  # a copy's closures run a model of their own


def referred(closure: object, parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that a closure refers to and that hold any of the parameters."""
    wanted = {id(p) for p in parameters}
    found = {id(m): m for m in _search(closure, DEPTH, set()) if any(id(p) in wanted for p in m.parameters())}
    inner = {id(child) for m in found.values() for child in m.modules() if child is not m}
    return [m for key, m in found.items() if key not in inner]


def _search(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if issubclass(type(value), nn.Module):
        yield value
    elif depth:
        for inner in _inside(value):
            yield from _search(inner, depth - 1, seen)


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value refers to: variables of a function, items of a container, attributes of an object.

    By its type alone, so that no property, proxy or lazy container runs code of its own.
    """
    kind = type(value)
    if issubclass(kind, type | Tensor | ModuleType):
        return ()
    if kind is MethodType:
        return [value.__self__, value.__func__]
    if kind is partial:
        return [value.func, *value.args, *value.keywords.values()]
    if kind is FunctionType:
        return [*_variables(value), *value.__dict__.values()]  # a compiled function keeps the original there
    if issubclass(kind, dict):
        return list(dict.values(value)) if dict.__len__(value) <= LARGE else ()
    if kind in (list, tuple):
        return value if len(value) <= LARGE else ()
    try:
        return list(object.__getattribute__(value, "__dict__").values())
    except AttributeError:
        return ()


def _variables(function: FunctionType) -> Iterator[Any]:
    """Yield the values of a function's cells and defaults, and of the globals that it names."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))  # lambdas and comprehensions
    return set(code.co_names).union(*inner)
