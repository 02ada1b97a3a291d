"""What surrounds every pass of a closure: random state, running statistics and gradients are put back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from steppe.engine.parameters import Parameters
from steppe.engine.vector import Vector


class Passes:
    """The passes of one step over one batch.

    The first pass at ``w`` is an ordinary one; every other pass draws the same numbers from torch's generators
    (Python's and NumPy's go on) and leaves normalisation statistics as they were.

    Args:
        parameters: the parameters.
        modules: those that may run; others are found by a hook.
    """

    def __init__(self, parameters: Parameters, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self.parameters, self.modules = parameters, modules
        self.counted = False  # whether the statistics have seen the batch
        self._random: tuple[RandomState, RandomState] | None = None  # before and after the first pass

    @contextmanager
    def one(self, away: bool) -> Iterator[None]:
        """Around a pass, at ``w`` or away from it. Gradients are dropped before and after."""
        self.drop()
        torch.clear_autocast_cache()  # weights may have moved, or a forward without gradients have cast them
        devices = self.parameters.devices
        start, end = self._random or (RandomState.now(devices), None)
        if end is not None:
            start.restore()
        try:
            if self.counted or away:
                with frozen_statistics(self.modules()), torch.enable_grad():
                    yield
            else:
                with torch.enable_grad():
                    yield
                self.counted = True
        finally:
            self.drop()
            if end is not None:
                end.restore()  # the stream goes on as after one ordinary pass
        self._random = (start, end or RandomState.now(devices))

    def rewind(self) -> None:
        """As if no pass had been."""
        if self._random is not None:
            self._random[0].restore()
            self._random = None

    def forget_unsharded(self) -> None:
        """Whole parameters that ``fully_shard`` has gathered are of other weights than those of the next pass."""
        if self.parameters.sharded:
            reshard(self.modules())

    def take(self) -> Vector:
        """The gradients, out of reach of the next pass."""
        return Vector([_take(p) for p in self.parameters.tensors])

    @contextmanager
    def only(self, wrt: Sequence[bool] | None) -> Iterator[None]:
        """Freeze the parameters where ``wrt`` is false, so that their backward is saved."""
        left_out = [] if wrt is None else [p for p, k in zip(self.parameters.tensors, wrt, strict=True) if not k]
        left_out = [p for p in left_out if p.requires_grad]
        for p in left_out:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in left_out:
                p.requires_grad_(True)

    def drop(self) -> None:
        """Let go of the gradients."""
        for p in self.parameters.tensors:
            p.grad = None


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let modules under ``fully_shard`` forget the whole parameters that a forward without a backward left behind."""
    for module in modules:
        let_go = getattr(module, "reshard", None)
        if callable(let_go):
            let_go()


def _take(p: Tensor) -> Tensor | None:
    g, p.grad = p.grad, None
    if g is None:
        return None
    if g.is_sparse:
        raise TypeError("steppe needs dense gradients, got a sparse one: use nn.Embedding(sparse=False)")
    storage = g.untyped_storage()
    shared = torch._C._storage_Use_Count(storage._cdata) > 2  # more than g and `storage`: a bucket, as under DDP
    return g.detach().clone() if shared else g.detach()


def capturing(devices: Iterable[torch.device]) -> bool:
    """Whether a CUDA graph is being captured: then no value can be read, and nothing copied from the host."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class RandomState:
    """The state of torch's default generators: the CPU's and those of the devices in use."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """Read the generators; while a CUDA graph is captured there is nothing to read: masks are drawn anew."""
        devices = list(devices)
        devices = [] if capturing(devices) else devices
        return cls(
            torch.get_rng_state(),
            {d: torch.get_device_module(d.type).get_rng_state(d) for d in devices},
        )

    def restore(self) -> None:
        """Set the generators back, so that the next pass draws the same dropout masks."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device.type).set_rng_state(state, device)


class _Snapshot:
    """Copies of the buffers of modules in training mode, put back in place and bit for bit."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], object] = {}  # keeps what the ids belong to
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.bound: list[tuple[nn.Module, str, Tensor]] = []

    def take(self, module: nn.Module, _inputs: object = None) -> None:
        if not module.training or not module._buffers:
            return
        known = (id(module), 0) in self.seen
        self.seen[id(module), 0] = module
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.dtype == torch.bool or (id(module), id(buffer)) in self.seen:
                continue  # a mask is no statistic
            self.seen[id(module), id(buffer)] = buffer
            self.copies.append((buffer, buffer.clone()))
            if not known:  # else swapped in for this call, as functional_call does, and not the module's own
                self.bound.append((module, name, buffer))

    def restore(self) -> None:
        for buffer, copy in self.copies:
            buffer.copy_(copy)
        for module, name, buffer in self.bound:
            module._buffers[name] = buffer  # a module may have bound a new tensor


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Undo every change that a pass makes to the buffers of modules in training mode, also when it raises.

    Batch, instance, synchronised and custom normalisation keep running statistics in buffers; so do spectral norm and
    observers. Setting their momentum to 0 is not the same: it still counts batches, and 0 times inf is NaN.

    Args:
        modules: those known to run. Others are found by a forward hook that is active inside only, except where a
            known one is compiled: compiled code runs without hooks, and torch warns of them.
    """
    snapshot = _Snapshot()
    compiled = False
    for module in modules:
        compiled |= "_orig_mod" in module._modules
        if module._buffers:
            snapshot.take(module)
    hook = None if compiled else register_module_forward_pre_hook(snapshot.take)
    hooks = {} if hook is None else hook.hooks_dict_ref() or {}
    try:
        yield
    finally:
        if hook is not None:  # not hook.remove(): its weak reference is dead where a step left half done is garbage
            hooks.pop(hook.id, None)
        with torch.no_grad():
            snapshot.restore()


class Owners:
    """The modules that a plain closure may run; looked for once, and again where one is gone or a parameter is new."""

    def __init__(self) -> None:
        self._known, self._found = 0, list[weakref.ref[nn.Module]]()

    def modules(self, parameters: Sequence[Tensor]) -> Iterator[nn.Module]:
        """All modules of those that hold the parameters."""
        if self._known != len(parameters) or any(module() is None for module in self._found):
            self._known, self._found = len(parameters), [weakref.ref(module) for module in owners(parameters)]
        for reference in self._found:
            module = reference()
            if module is not None:
                yield from module.modules()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Owners, ()  # a copy has a model of its own


def owners(parameters: Sequence[Tensor]) -> list[nn.Module]:
    """The outermost modules alive that hold any of the parameters: whose statistics a plain closure may touch.

    A plain closure does not name its model, and hooks do not reach compiled code or a direct ``module.forward``.
    """
    wanted = {id(p) for p in parameters}
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module) and "_modules" in m.__dict__]
    inner = {id(child) for m in modules for child in m._modules.values()}
    outermost = [m for m in modules if id(m) not in inner]
    return [m for m in outermost if any(id(p) in wanted for p in m.parameters())]
