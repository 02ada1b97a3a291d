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
from steppe.factored.sites import HARMLESS, CannotFactor, Interception, Mode, name_of

Spans = list[tuple[int, int, str]]  # of tensors: the first byte, the byte after the last, the name


def spans(tensors: Iterable[tuple[str, Tensor]]) -> Spans:
    """Return the memory of every tensor."""
    found = []
    for name, t in tensors:
        if t.numel() and t.layout == torch.strided and t.device.type != "meta":
            reach = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + (reach + 1) * t.element_size(), name))
    return found


def shares_memory(args: Any, known: Spans) -> str | None:
    """Return the name of a known tensor whose memory one of some arguments shares; ``None`` without one."""
    leaves = [("", t) for t in tree_leaves(args) if type(t) is Tensor or isinstance(t, torch.nn.Parameter)]
    seen = spans(leaves)
    return next((name for start, end, _ in seen for a, b, name in known if start < b and a < end), None)


class Kernels(TorchDispatchMode):
    """Watches the kernels below the torch functions of a first pass.

    A kernel that reads the memory of a perturbed parameter while no layer is at work belongs to a use that no torch
    function shows: by TorchScript, by ``torch.func``, by a function with a backward of its own, through an alias.
    """

    def __init__(self, first: FirstPass) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.first, self.known, self.found = first, _parameters(first), ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self.first.inside and not self.found and name_of(func).partition(".")[0] not in HARMLESS:
            name = shares_memory((args, kwargs), self.known)
            if name is not None:
                self.found = f"{name} is used by {func} out of sight: by a script, an alias or a function of its own"
        return func(*args, **(kwargs or {}))

    def check(self) -> None:
        """Raise where there was such a use."""
        if self.found:
            raise CannotFactor(self.found)


def _parameters(passing: Interception) -> Spans:
    return spans((passing.tracked.names[i], p) for i, p in passing.tracked.tensors.items())


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
    for passing in _passes():
        with torch._C.DisableTorchFunction():
            name = None if passing.inside else shares_memory((args, kwargs), _parameters(passing))
        if name is not None:
            raise CannotFactor(f"{name} is used by the TorchScript function {script.name}")
    return call(script, *args, **kwargs)


def _compiled_as_it_runs(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _passes():
        raise CannotFactor("torch.cond, scan and other functions of functions are compiled as they run")
    return call(*args, **kwargs)


def _checkpoint(call: Callable[..., Any], function: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    stack = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Mode)]
    modes = [(mode, (mode.count, mode.lookups)) for mode in stack]

    def again(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for mode, place in modes:
                stack.enter_context(mode.again(place))
            return function(*args, **kwargs)

    if not modes:
        return call(function, *rest, **kwargs)
    *options, _ = rest[:5]  # not to stop early: the inputs of all layers are needed
    return call(again, *options, False, *rest[5:], **kwargs)


def _passes() -> list[Interception]:
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Interception)]
