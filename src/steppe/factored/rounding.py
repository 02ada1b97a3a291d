"""How far shared passes and the serial loop may differ by rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounding:
    """How far two ways may differ by rounding alone, from the unit roundoff ``u`` of the least precise numbers in them.

    ``u`` is 1e-16 in float64, 6e-8 in float32, 2e-3 in bfloat16, 5e-4 in float16, and on an accelerator, whose
    products may be rounded to TF32, at least 5e-4.

    Losses are continuous in the weights. Sums in another order move them by a few ``u``: 64 ``u`` are allowed,
    relative to the mean loss plus one, because a cross entropy is a difference of numbers of that size. A deep model
    with normalisation amplifies rounding: where weights rounded by a few ``u`` move its losses farther, 64 times that.

    Gradients are not continuous where a ReLU or a maximum changes sides. Rounding flips a share of about ``c u`` of
    the units. A flipped unit contributes its part of the gradient or does not, and parts add up like random numbers,
    so the relative difference is about ``sqrt(c u)``: ``20 sqrt(u)`` are allowed, which is 5e-3 in float32, and a half
    at most: in low precision the losses carry the proof. In float64
    less than one unit in 1e12 flips, and 1e-9 is allowed for both.

    Of every parameter a hundredth of the whole gradient's norm is added to its own, because a gradient may be zero but
    for rounding, such as that of a bias before a normalisation.
    """

    u: float
    amplified: float = 0.0  # how far weights rounded by ``4 u`` move the losses

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Rounding:
        """Return the rounding of the least precise of some tensors."""
        u = max(torch.finfo(t.dtype).eps / 2 for t in tensors)
        return cls(max(u, 5e-4) if u > 1e-9 and any(t.device.type != "cpu" for t in tensors) else u)

    @property
    def losses(self) -> float:
        """The bound for losses."""
        return max(64 * self.u, 64 * self.amplified, 1e-9)

    @property
    def gradients(self) -> float:
        """The bound for gradients."""
        return min(20 * self.u**0.5, 0.5) if self.u > 1e-12 else 1e-9

    def of_model(self, losses: Callable[[], Tensor], tensors: Sequence[Tensor], scale: float) -> Rounding:
        """Return the same for a model whose losses, times ``scale``, move with its weights; these are restored."""
        before, saved = losses(), [p.detach().clone() for p in tensors]
        try:
            with torch.no_grad():
                for p in tensors:
                    about = torch.arange(p.numel(), device=p.device).cos().reshape(p.shape)  # irregular, of size 1
                    p.addcmul_(p, about.to(p.dtype), value=4 * self.u)
            moved = float((losses() - before).abs().max()) / (float(before.abs().mean()) + scale)
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), saved)
        return replace(self, amplified=moved)
