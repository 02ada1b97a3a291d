"""What a further pass over the same batch must not change: normalisation statistics and the random stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@dataclass(frozen=True)
class RandomState:
    """The state of torch's random generators: the CPU's and those of the devices in use."""

    cpu: Tensor
    devices: dict[torch.device, Tensor]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """Read the generators."""
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
        self.buffers: dict[int, tuple[nn.Module, list[tuple[str, Tensor, Tensor]]]] = {}

    def take(self, module: nn.Module, _inputs: object = None) -> None:
        if not module.training or not module._buffers or id(module) in self.buffers:
            return
        named = [(name, b, b.clone()) for name, b in module._buffers.items() if b is not None]
        self.buffers[id(module)] = (module, named)

    def restore(self) -> None:
        for module, named in self.buffers.values():
            for name, buffer, copy in named:
                buffer.copy_(copy)
                module._buffers[name] = buffer  # a module may have bound a new tensor


@contextmanager
def frozen_statistics(modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Undo every change that a pass makes to the buffers of modules in training mode, also when it raises.

    Batch, instance, synchronised and custom normalisation keep running statistics in buffers; so do spectral norm and
    observers. Setting their momentum to 0 is not the same: it still counts batches, and 0 times inf is NaN.

    Args:
        modules: the modules that may run. ``None`` finds them with a forward hook that is active inside only.
    """
    snapshot = _Snapshot()
    hook = None
    if modules is None:
        hook = register_module_forward_pre_hook(snapshot.take)
    else:
        for module in modules:
            snapshot.take(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        with torch.no_grad():
            snapshot.restore()
