"""What becomes of ``g`` and ``g_adv``."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import TINY, Vector
from steppe.pieces.protocol import Declaration


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

    Raises:
        ValueError: ``gamma`` is not in [0, 1).
    """

    gamma: float = 0.9

    declares: ClassVar[Declaration] = Declaration(linear=True)

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(f.g, beside=_odds(self.gamma) * (g_adv - f.g))


@dataclass(frozen=True)
class Coupled:
    """``g + gamma / (1 - gamma) (g_adv - g)`` to the base: Coupled-WSAM, algorithm 4 (arXiv 2305.15817).

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

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(g_adv * (1 + self.alpha * along(f.g, g_adv)) - self.alpha * f.g)


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
