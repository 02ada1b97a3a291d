"""pytorch_optimizer's methods of the same names, each with a step that also makes the gradients it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

try:
    import pytorch_optimizer as other
except ImportError:  # the comparison is left out, and the record says so
    other = None

NAME = f"pytorch_optimizer {version('pytorch_optimizer')}" if other else None
Closure = Callable[[], Any]
Step = Callable[[Closure], object]
Maker = Callable[[Iterable[Tensor], float], Step]


def _after_gradients(method: str, **options: Any) -> Maker:
    """Methods whose ``step(closure)`` expects gradients to exist."""

    def make(parameters: Iterable[Tensor], lr: float) -> Step:
        optimizer = getattr(other, method)(parameters, torch.optim.SGD, lr=lr, **options)

        def step(closure: Closure) -> None:
            closure()
            optimizer.step(closure)

        return step

    return make


def _gsam(parameters: Iterable[Tensor], lr: float) -> Step:
    rho = SimpleNamespace(step=lambda: 0.05)
    optimizer = other.GSAM(parameters, torch.optim.SGD(parameters, lr=lr), nn.Module(), rho)
    return lambda closure: optimizer.step(lambda: (None, closure()))


def _wsam(**options: Any) -> Maker:
    return lambda parameters, lr: other.WSAM(nn.Module(), parameters, torch.optim.SGD, lr=lr, **options).step


RIVALS: dict[str, Maker] = {
    "SAM": _after_gradients("SAM"),
    "ASAM": _after_gradients("SAM", adaptive=True),
    "GSAM": _gsam,
    "WSAM": _wsam(),
    "CoupledWSAM": _wsam(decouple=False),
    "LookSAM": _after_gradients("LookSAM"),
    "FSAM": _after_gradients("FriendlySAM"),
}
