"""The modules that a plain closure runs, found by looking at what the closure refers to."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.engine.ddp import distributed_run
from steppe.engine.grads import modules_of

MOST = 2_000  # values that a search looks at: about 1 ms
LARGE = 1_000  # containers with more items hold data, not models


def modules_behind(
    closure: object, parameters: Sequence[Tensor], model: nn.Module | None = None
) -> Callable[[], Iterator[nn.Module]]:
    """Return what yields every module inside those that a closure refers to and that hold any of the parameters.

    A plain closure does not name its model. The modules that it calls are found by a forward hook, but compiled code
    and a direct ``module.forward`` run without hooks, and DDP has to be told before its forward. So the variables that
    the closure refers to are searched once a step: cells, globals, bound objects, their attributes and methods. Where
    the user has named the model, nothing is searched.
    """
    found = referred(closure, parameters) if model is None else [model]
    return lambda: chain.from_iterable(map(modules_of, found))


def referred(closure: object, parameters: Iterable[Tensor]) -> list[nn.Module]:
    """Return the outermost modules that a closure refers to and that hold any of the parameters.

    The nearest variables come first. In one process the search ends where every parameter has been found; with several
    it goes on, as a replica around the model may be farther away.
    """
    wanted = {id(p) for p in parameters}
    several = distributed_run()
    found: list[nn.Module] = []
    missing = set(wanted)
    for modules in _levels(closure):
        for module in modules:
            held = {id(p) for inner in modules_of(module) for p in inner._parameters.values()}
            if not held.isdisjoint(wanted):
                found.append(module)
                missing -= held
        if not missing and not several:
            break
    if len(found) == 1:
        return found
    inner = {id(child) for module in found for child in modules_of(module)[1:]}
    return [module for module in found if id(module) not in inner]


def _levels(closure: object) -> Iterator[list[nn.Module]]:
    """Yield the modules that are one reference away from the closure, then those at two, and so on."""
    seen, level = {id(closure)}, [closure]
    while level:
        yield [value for value in level if issubclass(type(value), nn.Module)]  # type: ignore[misc]
        inner = (v for value in level if not issubclass(type(value), nn.Module) for v in _inside(value))
        level = []
        for value in islice(inner, MOST):
            if id(value) not in seen and len(seen) < MOST:
                seen.add(id(value))
                level.append(value)


def _inside(value: Any) -> Iterable[Any]:
    """Return what a value refers to: variables of a function, items of a container, attributes of an object.

    Only types and stored attributes are read, so no property, proxy or lazy container runs its code.
    """
    kind = type(value)
    if issubclass(kind, type | Tensor | ModuleType | Optimizer | str | bytes | int | float | None):
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
    return _attributes(value, kind)


def _attributes(value: Any, kind: type) -> Iterator[Any]:
    """Yield the attributes of an object, and the functions of its class, whose globals they may use."""
    with suppress(AttributeError):
        yield from object.__getattribute__(value, "__dict__").values()
    for base in kind.__mro__[:-1]:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            with suppress(AttributeError):
                yield object.__getattribute__(value, name)
        yield from (member for member in base.__dict__.values() if type(member) is FunctionType)


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
