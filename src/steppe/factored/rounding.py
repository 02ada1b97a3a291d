"""How far shared passes and the serial loop may differ by rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steppe.engine.vector import LOW, wide

Found = tuple[Tensor, Sequence[Tensor | None]]  # losses, and gradients by parameter


@dataclass(frozen=True)
class Rounding:
    """How far two ways may differ by rounding alone, from the unit roundoff ``u`` of the least precise numbers in them.

    ``u`` is 1e-16 in float64, 6e-8 in float32, 2e-3 in bfloat16, 5e-4 in float16, and on an accelerator, whose
    products may be rounded to TF32, at least 5e-4. Where it is so large, rounding hides what examples do to one
    another, and the proof is made in float32 (:class:`InFloat32`).

    Losses are continuous in the weights. Sums in another order move them by a few ``u``: 64 ``u`` are allowed,
    relative to the mean loss plus one, because a cross entropy is a difference of numbers of that size.

    Gradients are not continuous where a ReLU or a maximum changes sides. Rounding flips a share of about ``c u`` of
    the units. A flipped unit contributes its part of the gradient or does not, and parts add up like random numbers,
    so the relative difference is about ``sqrt(c u)``: ``40 sqrt(u)`` are allowed, which is 1e-2 in float32, and a half
    at most: in low precision the losses carry the proof. In float64
    less than one unit in 1e12 flips, and 1e-9 is allowed for both.

    The losses at ``w + eps_k`` have risen by about ``eps_k`` times the gradient: of that, the bound for gradients is
    allowed in addition.

    A deep model amplifies rounding, most of all one that normalises few values. So where weights that are rounded by
    ``4 u`` move the losses or the update of one micro-batch farther than this, 64 times that is allowed, in the losses
    0.03 at most. A model that gives other losses for the same weights does not round: it gets no more.

    Of every parameter a hundredth of the whole gradient's norm is added to its own, because a gradient may be zero but
    for rounding, such as that of a bias before a normalisation.
    """

    u: float
    moved: tuple[float, float] = (0.0, 0.0)  # how far weights rounded by ``4 u`` move the losses and the update

    @classmethod
    def of(cls, tensors: Sequence[Tensor], exact: bool = False) -> Rounding:
        """Return the rounding of the least precise of some tensors; ``exact`` says that TF32 is off."""
        u = max(torch.finfo(t.dtype).eps / 2 for t in tensors)
        return cls(max(u, 5e-4) if u > 1e-9 and not exact and any(t.device.type != "cpu" for t in tensors) else u)

    @property
    def low(self) -> bool:
        """Whether rounding is too coarse for a proof."""
        return self.u > 1e-6

    @property
    def losses(self) -> float:
        """The bound for losses."""
        return max(64 * self.u, min(64 * self.moved[0], 0.03), 1e-9)

    @property
    def gradients(self) -> float:
        """The bound for gradients."""
        least = 40 * self.u**0.5 if self.u > 1e-12 else 1e-9
        return min(max(least, 64 * self.moved[1]), 0.5)

    def of_model(self, run: Callable[[], Found], tensors: Sequence[Tensor], scale: float) -> Rounding:
        """Return the same for a model that amplifies rounding.

        Args:
            run: returns losses, times ``scale``, and gradients.
            tensors: the weights, which are restored.
            scale: the scale.
        """
        before, again, saved = run(), run(), [p.detach().clone() for p in tensors]
        try:
            with torch.no_grad():
                for p in tensors:
                    about = torch.arange(p.numel(), device=p.device).cos().reshape(p.shape)  # irregular, of size 1
                    p.addcmul_(p, about.to(p.dtype), value=4 * self.u)
            moved, chance = _moved(run(), before, scale), _moved(again, before, scale)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), saved)
        return self if chance[0] > moved[0] / 4 else replace(self, moved=moved)


class InFloat32(TorchFunctionMode):
    """Runs a model in float32 that runs in low precision by itself.

    Autocast is off, tensors of low precision are cast before each torch function, and parameters are replaced by
    copies. It has to be the innermost mode.

    Args:
        parameters: those to copy, where they have low precision.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        low = [p for p in parameters if p.dtype in LOW]
        self.copies = {id(p): p.detach().float().requires_grad_(p.requires_grad) for p in low}
        self.devices = {"cpu", *(p.device.type for p in parameters)}

    def copy(self, p: Tensor) -> Tensor:
        """Return what stands for a parameter."""
        return self.copies.get(id(p), p)

    def place(self) -> None:
        """Return nothing: the mode is everywhere the same."""

    @contextmanager
    def again(self, place: None) -> Iterator[None]:
        """Surround what activation checkpointing computes again."""
        with self:
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        enabled = [d for d in self.devices if torch.is_autocast_enabled(d)]
        for device in enabled:
            torch.set_autocast_enabled(device, False)
        try:
            func = torch.Tensor.float if func in (torch.Tensor.half, torch.Tensor.bfloat16) else func
            return func(*self._wide(args), **self._wide(kwargs or {}))
        finally:
            for device in enabled:
                torch.set_autocast_enabled(device, True)

    def _wide(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.copies[id(a)] if id(a) in self.copies else a.float() if a.dtype in LOW else a
        if isinstance(a, dict):
            return {key: self._wide(value) for key, value in a.items()}
        if type(a) in (tuple, list):
            return type(a)(map(self._wide, a))
        return torch.float32 if isinstance(a, torch.dtype) and a in LOW else a


@contextmanager
def no_cast(devices: Iterable[str]) -> Iterator[None]:
    """Turn off what rounds float32 outside the model too: an autocast around the step, and TF32 of an accelerator."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn] if torch.cuda.is_available() else []
    before = [place.allow_tf32 for place in places]
    with ExitStack() as off:
        for device in devices:
            off.enter_context(torch.autocast(device, enabled=False))
        try:
            for place in places:
                place.allow_tf32 = False
            yield
        finally:
            for place, allowed in zip(places, before, strict=True):
                place.allow_tf32 = allowed


def differences(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> list[float | None]:
    """Return how far the gradients of each parameter are apart; ``None`` where one of them is missing."""
    total = sum(float(wide(t).norm()) ** 2 for t in theirs if t is not None) ** 0.5
    return [
        None
        if a is None or b is None
        else float((wide(a) - wide(b)).norm()) / (float(wide(b).norm()) + 1e-2 * total + 1e-300)
        for a, b in zip(ours, theirs, strict=True)
    ]


def _moved(found: Found, before: Found, scale: float) -> tuple[float, float]:
    losses = float((found[0] - before[0]).abs().max()) / (float(before[0].abs().mean()) + scale)
    return losses, max((d for d in differences(found[1], before[1]) if d is not None), default=0.0)
