"""What a further pass over the same batch must not change: random streams and running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.module import register_module_forward_pre_hook


def capturing(devices: Iterable[torch.device]) -> bool:
    """Tell whether a CUDA graph is being captured: then no value can be read, and nothing copied from the host."""
    return any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class RandomState:
    """The state of torch's default generators: the CPU's and those of the devices in use."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """Read the generators, except while a CUDA graph is captured: there every pass draws its own masks."""
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


class Snapshot:
    """Copies of the buffers of modules in training mode, put back in place and bit for bit.

    Args:
        modules: those to copy from now.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self.seen: dict[tuple[int, int], object] = {}  # keeps what the ids belong to
        self.copies: list[tuple[Tensor, Tensor, int]] = []  # a buffer, its copy, its version
        self.bound: list[tuple[nn.Module, str, Tensor]] = []
        self.ran: list[nn.Module] = []
        self.thread = get_ident()
        for module in modules:
            self.take(module)

    def run(self, module: nn.Module, _inputs: object) -> None:
        """Take a module that is about to run, as a forward hook; what another thread runs is not this pass's."""
        if get_ident() == self.thread:
            self.ran.append(module)
            self.take(module)

    def take(self, module: nn.Module) -> None:
        """Copy the buffers of a module in training mode."""
        if is_compiled(module):  # the modules inside run without hooks
            for inner in list(module.modules())[1:]:
                self.take(inner)
        if not module.training or not module._buffers:
            return
        known = (id(module), 0) in self.seen
        self.seen[id(module), 0] = module
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.dtype == torch.bool or (id(module), id(buffer)) in self.seen:
                continue  # a mask is no statistic
            self.seen[id(module), id(buffer)] = buffer
            self.copies.append((buffer, buffer.clone(), buffer._version))
            if not known:  # else swapped in for this call, as functional_call does, and not the module's own
                self.bound.append((module, name, buffer))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back; a buffer that nothing has changed keeps its version, which autograd compares."""
        for buffer, copy, version in self.copies:
            unchanged = buffer._version == version
            with _unsafe_preserve_version_counter(buffer) if unchanged else nullcontext():
                buffer.copy_(copy)
        for module, name, buffer in self.bound:
            module._buffers[name] = buffer  # a module may have bound a new tensor


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``torch.compile(module)`` made the module, or ``module.compile()`` compiled it in place."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module] = ()) -> Iterator[list[nn.Module]]:
    """Undo every change that a pass makes to the buffers of modules in training mode, also when it raises.

    Batch, instance, synchronised and custom normalisation keep running statistics in buffers; so do spectral norm and
    observers. Setting their momentum to 0 is not the same: it still counts batches, and 0 times inf is NaN.

    Args:
        modules: those known to run. Others are found by a forward hook that is active inside only, except where a
            known one is compiled: compiled code runs without hooks, and torch warns of them.

    Yields:
        The modules that have run inside, as far as the hook has seen them.
    """
    snapshot = Snapshot()
    compiled = False
    for module in modules:
        compiled |= is_compiled(module)
        if module._buffers:
            snapshot.take(module)
    hook = None if compiled else register_module_forward_pre_hook(snapshot.run)
    hooks = {} if hook is None else hook.hooks_dict_ref() or {}
    try:
        yield snapshot.ran
    finally:
        if hook is not None:  # not hook.remove(): its weak reference is dead where a step left half done is garbage
            hooks.pop(hook.id, None)
        snapshot.restore()


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that depends on seed and step alone: the same on every rank and after a resume."""
    return torch.Generator(device=device).manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
