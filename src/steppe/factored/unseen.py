"""Uses of parameters that an interception of torch functions does not see: scripts, aliases, transformed tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
import torch._higher_order_ops.utils
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steppe.factored.passes import FirstPass
from steppe.factored.sites import Interception
from steppe.factored.tracked import HARMLESS, CannotFactor, name_of

Span = tuple[int, int, str]  # the first byte of a tensor, the byte after its last, its name


def spans(tensors: Iterable[tuple[str, Tensor]]) -> list[Span]:
    """Return the memory of every tensor."""
    return [(*_span(t), name) for name, t in tensors if t.numel()]


def _span(t: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size()


def shares_memory(t: Any, known: Iterable[Span]) -> str | None:
    """Return the name of a tensor whose memory ``t`` shares; ``None`` without one, or where ``t`` has no memory."""
    if type(t) is not Tensor and not isinstance(t, torch.nn.Parameter):
        return None
    if t.layout != torch.strided or t.device.type == "meta" or not t.numel():
        return None
    start, end = _span(t)
    return next((name for a, b, name in known if start < b and a < end), None)


class Kernels(TorchDispatchMode):
    """Watches the kernels below the torch functions of a first pass.

    A kernel that reads the memory of a perturbed parameter while no layer is at work belongs to a use that no torch
    function shows: by TorchScript, by ``torch.func``, by a function with a backward of its own, through an alias.

    Args:
        first: the pass.
        parameters: name and tensor of the perturbed parameters.
    """

    def __init__(self, first: FirstPass, parameters: Iterable[tuple[str, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first, self.known = first, spans(parameters)
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self.first.inside and not self.found and name_of(func).partition(".")[0] not in HARMLESS:
            names = (shares_memory(t, self.known) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            name = next(filter(None, names), None)
            if name is not None:
                self.found = f"{name} is used by {func} out of sight: by a script, an alias or a function of its own"
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise where there was such a use."""
        if self.found:
            raise CannotFactor(self.found)


def watch() -> None:
    """Watch from now on what runs below torch functions, or again in the backward pass.

    TorchScript refuses perturbed parameters, ``torch.cond`` and the like refuse all shared passes, and what activation
    checkpointing computes again is intercepted as in the forward pass. All of this concerns the thread of a shared pass
    alone; outside a pass it costs a microsecond a call.
    """
    for owner, name, around in (
        (torch.jit.ScriptFunction, "__call__", _script),
        (torch._C.ScriptMethod, "__call__", _script),
        (torch._higher_order_ops.utils, "_hop_compile_and_call", _compiled_as_it_runs),
        (torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _checkpoint),
    ):
        call = getattr(owner, name, None)  # private ones are not in every release
        if call is not None and not hasattr(call, "watched"):
            setattr(owner, name, _watched(around, call))


def _watched(around: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        return around(call, *args, **kwargs)

    watched.watched = True  # type: ignore[attr-defined]
    return watched


def _script(call: Callable[..., Any], script: Any, *args: Any, **kwargs: Any) -> Any:
    for mode in _passes():
        if not mode.inside:
            _refuse(mode, script, tree_leaves((args, kwargs)))
    return call(script, *args, **kwargs)


def _compiled_as_it_runs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _passes():
        raise CannotFactor("torch.cond, scan and other functions of functions are compiled as they run")
    return call(*args, **kwargs)


def _checkpoint(
    call: Callable[..., Any],
    function: Callable[..., Any],
    preserve_rng_state: bool,
    context_fn: Any,
    determinism_check: str,
    debug: bool,
    early_stop: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    modes = [(mode, mode.place()) for mode in _get_current_function_mode_stack() if hasattr(mode, "again")]

    def again(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for mode, place in modes:
                stack.enter_context(mode.again(place))
            return function(*args, **kwargs)

    early_stop = early_stop and not modes  # else all is computed again: the inputs of all layers are needed
    run = again if modes else function
    return call(run, preserve_rng_state, context_fn, determinism_check, debug, early_stop, *args, **kwargs)


def _passes() -> list[Interception]:
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Interception)]


def _refuse(passing: Interception, script: Any, args: Iterable[Any]) -> None:
    with torch._C.DisableTorchFunction():
        known = spans((passing.tracked.names[i], p) for i, p in passing.tracked.tensors.items())
        for t in args:
            name = shares_memory(t, known)
            if name is not None:
                raise CannotFactor(f"{name} is used by the TorchScript function {script.name}")
