"""What becomes of ``g`` and ``g_adv``."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import TINY, Scalar, Vector
from steppe.pieces.protocol import Declaration
from steppe.schedule import Schedule, scheduled


@dataclass(frozen=True)
class Perturbed:
    """SAM: ``g_adv`` to the base optimizer."""

    declares: ClassVar[Declaration] = Declaration(g=False, linear=True)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(g_adv)


@dataclass(frozen=True)
class Weighted:
    """WSAM, algorithm 2 (arXiv 2305.15817): ``g`` to the base, ``gamma / (1 - gamma) (g_adv - g)`` beside it.

    ``w <- w - lr (B^-1 m + gamma / (1 - gamma) (g_adv - g))`` with ``m`` and ``B`` from the history of ``g`` alone;
    ``steppe.step.Pending.move`` does the part beside the base.

    Args:
        gamma: the weight of sharpness.
        clip_each: clip ``g`` and ``g_adv`` to this norm, each by itself, before they are subtracted, as the authors'
            code does with ``max_norm=``; the paper does not mention it. ``eps`` comes from ``g`` before it is clipped.
            The authors clip means over all ranks; here each rank, and each micro-batch, clips its own.

    Raises:
        ValueError: ``gamma`` is not in [0, 1), ``clip_each`` is not above 0.
    """

    gamma: float = 0.9
    clip_each: float | None = None

    @property
    def declares(self) -> Declaration:
        """Linear, unless it clips."""
        return Declaration(linear=self.clip_each is None)

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)
        if self.clip_each is not None:
            checks.positive("clip_each", self.clip_each, "a number > 0 or None")

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        g = f.g
        if self.clip_each is not None:
            g, g_adv = Update(g).clipped(self.clip_each).grad, Update(g_adv).clipped(self.clip_each).grad
        return Update(g, beside=_odds(self.gamma) * (g_adv - g))


@dataclass(frozen=True)
class Coupled:
    """``g + gamma / (1 - gamma) (g_adv - g)`` to the base: Coupled-WSAM, algorithm 4 (arXiv 2305.15817).

    Args:
        gamma: the weight of sharpness, in [0, 1); 0.5 is SAM.

    Raises:
        ValueError: ``gamma`` is not in [0, 1).
    """

    gamma: float = 0.9

    declares: ClassVar[Declaration] = Declaration(linear=True)

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(f.g.lerp(g_adv, _odds(self.gamma)))


@dataclass(frozen=True)
class SurrogateGap:
    """``g_adv - alpha (g - proj(g, g_adv))``: GSAM, algorithm 1 (arXiv 2203.08065).

    Ascends ``g`` orthogonally to ``g_adv``, which narrows the surrogate gap ``L(w + eps) - L(w)``.

    Args:
        alpha: the weight of the part of ``g`` orthogonal to ``g_adv``, at least 0.

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(g_adv * (1 + self.alpha * along(f.g, g_adv)) - self.alpha * f.g)


@dataclass(frozen=True)
class Rescaled:
    """``norm(g) / norm(g_adv) g_adv``: Stable SAM (arXiv 2401.07250)."""

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(f.g.norm() / (g_adv.norm() + TINY) * g_adv)


@dataclass(frozen=True)
class Damped:
    """``(1 - alpha m) g_adv``, ``m`` 1 in the entries that are smaller than ``g``'s and of one sign with them: SANER.

    Where a noisy gradient dominates an entry, the perturbation shrinks it (arXiv 2411.17132); this shrinks it further.

    Args:
        alpha: how much is taken off, in [0, 1]; a number, or a schedule of :mod:`steppe.schedule`, which is asked with
            the first parameter group. 0 is SAM.

    Raises:
        ValueError: ``alpha`` is not in [0, 1], or a schedule's answer is not, in ``step``.
    """

    alpha: float | Schedule = 0.5

    def __post_init__(self) -> None:
        if not callable(self.alpha):
            checks.share("alpha", self.alpha)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        alpha = scheduled(self.alpha, f.step, f.group, "alpha")
        checks.share("alpha", alpha)
        g = f.g + 0.0 * g_adv  # 0 where there is no gradient at w
        return Update(g_adv.map(lambda a, g: torch.where(_between(a, g), (1 - alpha) * a, a), g))


@dataclass(frozen=True)
class Slerp:
    """``norm(g_adv)`` times the point ``alpha`` of the great circle from ``g / norm(g)`` to ``g_adv / norm(g_adv)``.

    XSAM (arXiv 2603.10048) with a fixed ``alpha``: 0 has the direction of ``g``, 1 is SAM, more goes beyond it.

    Args:
        alpha: the share of the angle from ``g`` to ``g_adv``, at least 0.

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(g_adv.norm() * slerp(f.g, g_adv, self.alpha))


@dataclass(frozen=True)
class SearchedSlerp:
    """:class:`Slerp` with the ``alpha`` of 0, ``spacing``, ..., ``largest`` whose loss at a distance is the highest.

    XSAM (arXiv 2603.10048, and the authors' code). At steps 0, ``every``, 2 ``every``, ... the batch's loss is
    evaluated at ``w + reach rho`` times each direction, one forward each; ``alpha`` is kept until the next search. (The
    authors search once an epoch.)

    Args:
        every: how many steps apart the searches are.
        reach: the distance, in radii.
        largest: the largest ``alpha``.
        spacing: between the ``alpha`` that are tried.

    Raises:
        ValueError: ``every`` is no positive integer, another is not above 0.
    """

    every: int = 400
    reach: float = 2.0
    largest: float = 2.0
    spacing: float = 0.1

    declares: ClassVar[Declaration] = Declaration(examples=True, numbers=frozenset({"alpha"}))

    def __post_init__(self) -> None:
        checks.positive_integer("every", self.every)
        for name in ("reach", "largest", "spacing"):
            checks.positive(name, getattr(self, name))

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        alpha: Scalar = f.recall_number("alpha", default=1.0)
        if f.step % self.every == 0:
            alpha = self.search(f, g_adv)
            f.remember_number("alpha", alpha)
        return Update(g_adv.norm() * slerp(f.g, g_adv, alpha))

    def search(self, f: Oracle, g_adv: Vector) -> Tensor:
        """Return the ``alpha`` with the highest loss; of equal ones the first."""
        losses, numbers = [], f.passes.log.numbers
        of_the_step = {name: x for name, x in numbers.items() if name in ("eps_norm", "loss_adv")}
        for i in range(int(self.largest / self.spacing + 0.5) + 1):
            with f.at(f.rho * (self.reach * f.movable(slerp(f.g, g_adv, self.spacing * i)))):
                losses.append(f.losses().mean())
        numbers |= of_the_step  # not those of the last trial
        heights = f.passes.ranks.shared_mean(torch.stack(losses), f.passes.parameters.sharded)
        return self.spacing * heights.nan_to_num(-math.inf, math.inf, -math.inf).argmax().to(heights)


@dataclass(frozen=True)
class RememberOrthogonal:
    """``g_adv``, and its part orthogonal to ``g`` is remembered: the k-th steps of LookSAM (arXiv 2203.02714)."""

    declares: ClassVar[Declaration] = Declaration(remembers=frozenset({"orthogonal"}))

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        f.remember("orthogonal", g_adv - projection(g_adv, onto=f.g))
        return Update(g_adv)


@dataclass(frozen=True)
class ReuseOrthogonal:
    """``g + alpha norm(g) / norm(g_v) g_v``, ``g_v`` remembered: a rule, LookSAM's steps between (arXiv 2203.02714).

    Norms are over all parameters together. One pass.

    Args:
        alpha: the length of the remembered part in units of ``norm(g)``, at least 0.

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 0.7

    declares: ClassVar[Declaration] = Declaration(g_adv=False, remembers=frozenset({"orthogonal"}))

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle) -> Update:
        g = f.g
        g_v = f.recall("orthogonal", default=0.0 * g).where(t is not None for t in g.tensors)
        return Update(g + self.alpha * g.norm() / (g_v.norm() + TINY) * g_v)


def _between(a: Tensor, g: Tensor) -> Tensor:
    """Tell where ``0 < a / g < 1``."""
    return (a.abs() < g.abs()) & (a.sign() == g.sign())


def slerp(a: Vector, b: Vector, alpha: Scalar) -> Vector:
    """Return the unit vector ``alpha`` of the angle from ``a`` towards ``b``; over 1 it lies beyond ``b``."""
    a, b = a / (a.norm() + TINY), b / (b.norm() + TINY)
    angle = 2 * ((b - a).norm() / 2).clamp(max=1.0).arcsin()  # more exact for small angles than the arccos of <a, b>
    alpha, sine = alpha.to(angle) if isinstance(alpha, Tensor) else alpha, angle.sin()
    small = sine < 1e-8  # sin(x angle) / sin(angle) is x
    share_a, share_b = (torch.where(small, x, (x * angle).sin() / sine) for x in (1 - alpha, alpha))
    return share_a * a + share_b * b


def along(a: Vector, b: Vector) -> Tensor:
    """Return ``<a, b> / norm(b)^2``, the coefficient of ``b`` in ``a``; 0 where ``b`` is 0."""
    square = b.norm() ** 2
    return torch.where(square > 0, a.dot(b) / square, 0.0)


def projection(a: Vector, onto: Vector) -> Vector:
    """Return ``<a, b> / norm(b)^2 b``."""
    return along(a, onto) * onto


def _odds(gamma: float) -> float:
    """Return ``gamma / (1 - gamma)``, the weight of sharpness against the loss."""
    return gamma / (1 - gamma)


def _check_gamma(gamma: float) -> None:
    checks.number("gamma", gamma, "a number in [0, 1)", below=1.0)
