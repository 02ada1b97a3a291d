"""What shared passes and the serial loop have to agree in, and how far they may differ by rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.sites import CannotFactor, Unsure

Gradients = Sequence[Tensor | None]  # by parameter
Found = tuple[Tensor, Gradients]  # losses, and gradients


class Differs(CannotFactor):
    """Shared passes and the serial loop, or two examples, differ by more than rounding."""


@dataclass(frozen=True)
class Rounding:
    """How far two ways may differ by rounding alone, from the unit roundoff ``u`` of the least precise numbers in them.

    ``u`` is 1e-16 in float64, 6e-8 in float32, 2e-3 in bfloat16, 5e-4 in float16, and on an accelerator, whose
    products may be rounded to TF32, at least 5e-4. Where it is so large, rounding hides what examples do to one
    another, and the proof is made in float32 (:class:`~steppe.factored.conditions.InFloat32`).

    Losses are continuous in the weights. Sums in another order move them by a few ``u``: 64 ``u`` are allowed,
    relative to the mean loss plus one, because a cross entropy is a difference of numbers of that size.

    Gradients are not continuous where a ReLU or a maximum changes sides. Rounding flips a share of about ``c u`` of
    the units. A flipped unit contributes its part of the gradient or does not, and parts add up like random numbers,
    so the relative difference is about ``sqrt(c u)``: ``40 sqrt(u)`` are allowed, which is 1e-2 in float32, and a half
    at most: in low precision the losses carry the proof. In float64 less than one unit in 1e12 flips, and 1e-9 is
    allowed for both. The losses at ``w + eps_k`` have risen by about ``eps_k`` times the gradient: of that, the bound
    for gradients is allowed in addition.

    A deep model amplifies rounding, most of all one that normalises few values. So where weights that are rounded by
    ``4 u`` move the losses or the update of one micro-batch farther than this, 64 times that is allowed, in the losses
    0.03 at most. A model that gives other losses for the same weights does not round: it gets no more.

    A difference beyond 30 times the bound is the model's; a smaller one may be bad luck, and a later batch tells.
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

        def moved(losses: Tensor, gradients: Gradients) -> tuple[float, float]:
            by = float((losses - before[0]).abs().max()) / (float(before[0].abs().mean()) + scale)
            return by, max((d for d in _differences(gradients, before[1]) if d is not None), default=0.0)

        try:
            with torch.no_grad():
                for p in tensors:
                    about = torch.arange(p.numel(), device=p.device).cos().reshape(p.shape)  # irregular, of size 1
                    p.addcmul_(p, about.to(p.dtype), value=4 * self.u)
            by = moved(*run())
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), saved)
        return self if moved(*again)[0] > by[0] / 4 else replace(self, moved=by)

    # ---- what has to agree

    def check_losses(self, ours: Tensor, theirs: Tensor, at_w: Tensor, scale: float) -> None:
        """Raise unless losses are the same."""
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            raise Unsure("the losses of this batch are not finite")
        size = float(theirs.abs().mean()) + scale
        error, rise = (float((t - theirs).abs().max()) / size for t in (ours, at_w))
        reason = "the loss of an example depends on the other examples of its batch, or on chance"
        _judge(f"{reason}: it differs by {error:.0e}", error, self.losses + rise * self.gradients)

    def check_gradients(self, ours: Gradients, theirs: Gradients, names: Mapping[int, str]) -> None:
        """Raise unless gradients are the same; ``names`` are those of the perturbed parameters."""
        for i, error in enumerate(_differences(ours, theirs)):
            if i in names and (ours[i] is None) != (theirs[i] is None):
                raise CannotFactor(f"{names[i]} takes part in a way that was not recorded")
            if error is None:
                continue
            if not error < float("inf"):
                raise Unsure("a gradient of this batch is not finite")
            where = f"in the gradient of {names.get(i, f'parameter {i}')}"
            _judge(f"shared passes and the serial loop differ by {error:.0e} {where}", error, self.gradients)

    def check_buffers(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
        """Raise unless buffers, such as running statistics, are the same; integers exactly."""
        for a, b in zip(ours, theirs, strict=True):
            error = 1.0 if a.shape != b.shape else _distance(a, b)
            bound = self.losses if b.is_floating_point() else 0.0
            _judge(f"a buffer differs by {error:.0e} from what the serial loop leaves", error, bound)


def _judge(reason: str, error: float, bound: float) -> None:
    if not error <= bound:  # or it is no number
        raise Differs(reason, final=not error <= 30 * bound)


def _differences(ours: Gradients, theirs: Gradients) -> list[float | None]:
    """Return how far the gradients of each parameter are apart; ``None`` where one of them is missing.

    A hundredth of the whole gradient's norm is added to that of each parameter, because a gradient may be zero but for
    rounding, such as that of a bias before a normalisation.
    """
    least = 1e-2 * sum(float(wide(t).norm()) ** 2 for t in theirs if t is not None) ** 0.5 + 1e-300
    pairs = [None if a is None or b is None else (wide(a), wide(b)) for a, b in zip(ours, theirs, strict=True)]
    return [None if p is None else float((p[0] - p[1]).norm()) / (float(p[1].norm()) + least) for p in pairs]


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two buffers, relative to ``b``'s largest number; infinities may be equal."""
    a, b = (t.to(torch.float64 if t.is_floating_point() else torch.int64).flatten() for t in (a, b))
    other = (a != b) & ~(a.isnan() & b.isnan())
    if not other.any():
        return 0.0
    return float((a[other] - b[other]).abs().max() / (b[b.isfinite()].abs().max() + 1 if b.isfinite().any() else 1))
