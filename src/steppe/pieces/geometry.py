"""The unit step of steepest ascent along ``d``, in the norm that each method chose; rho multiplies it afterwards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.vector import TINY, Vector, norm_of, wide
from steppe.pieces.protocol import Declaration
from steppe.pieces.which import Matrices, Which
from steppe.schedule import Schedule, check_scheduled, scheduled


@dataclass(frozen=True)
class Euclidean:
    """``d / norm(d)``, the norm over all perturbed parameters together (SAM, arXiv 2010.01412, equation 2).

    1e-12 is added to the norm, as in most SAM code, so a shorter ``d`` gives less than length 1: half at 1e-12, nothing
    far below. A loss whose gradients are so small has to be scaled up; in float32 their squares underflow too.
    """

    declares: ClassVar[Declaration] = Declaration(radial=True)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        return self.radial(d.norm()) * d

    def radial(self, norm: Tensor) -> Tensor:
        """Return the factor of ``d``, made from its norm alone."""
        return 1 / (norm + TINY)


@dataclass(frozen=True)
class Unnormalised:
    """``d`` itself: USAM. Scaling the loss scales the perturbation."""

    declares: ClassVar[Declaration] = Declaration(radial=True)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        return d

    def radial(self, norm: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(norm)


@dataclass(frozen=True)
class Unified:
    """``(1 - lam + lam / norm(d)) d``: unified SAM (arXiv 2503.02225); ``lam`` 1 is SAM, 0 is USAM.

    Args:
        lam: how much of the step is normalised, in [0, 1].

    Raises:
        ValueError: ``lam`` is not in [0, 1].
    """

    lam: float = 0.5

    declares: ClassVar[Declaration] = Declaration(radial=True)

    def __post_init__(self) -> None:
        checks.share("lam", self.lam)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        return self.radial(d.norm()) * d

    def radial(self, norm: Tensor) -> Tensor:
        """Return ``1 - lam + lam / norm``."""
        return 1 - self.lam + self.lam / (norm + TINY)


@dataclass(frozen=True)
class Scaled:
    """``factor`` times another geometry; ESAM's is ``1 / beta``.

    Args:
        factor: the length of the step in units of the other geometry's, at least 0.
        of: the other geometry.

    Raises:
        ValueError: ``factor`` is negative.
    """

    factor: float
    of: Callable[[Oracle, Vector], Vector] = Euclidean()

    def __post_init__(self) -> None:
        checks.non_negative("factor", self.factor)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        return self.factor * self.of(f, d)


@dataclass(frozen=True)
class Adaptive:
    """``T^2 d / norm(T d)``, ``T = abs(w) + eta`` on the parameters ``on``, 1 on the rest: ASAM (arXiv 2102.11600).

    Then ``norm(T^-1 eps) = rho``: the ball follows the scale of each weight, so rho is some ten times SAM's.

    The authors adapt parameters whose name contains "weight" and leave biases plain. The default chooses by dimension,
    which needs no names: it differs for the weights of normalisation layers, which the authors adapt too
    (``on=Named("weight")`` is theirs to the letter, ``on=Everything()`` with ``eta=0`` is davda54/sam's).

    Args:
        eta: added to the size of every weight, at least 0.
        on: which parameters are adapted, :class:`Matrices`, :class:`Named`, :class:`Everything` or a function of the
            oracle that returns a ``bool`` for each.

    Raises:
        ValueError: ``eta`` is negative.
    """

    eta: float = 0.01
    on: Which = Matrices()

    def __post_init__(self) -> None:
        checks.non_negative("eta", self.eta)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        T2_d: list[Tensor | None] = []

        def T_d() -> Iterator[Tensor | None]:  # one by one: each is measured and then freed
            for T, t in self.diagonal(f, d):
                T_t = t if T is None or t is None else T * t
                T2_d.append(T_t if T is None or T_t is None else T.mul_(T_t))
                yield T_t

        norm = norm_of(T_d(), like=d)
        return Vector(T2_d) / (norm + TINY)

    def diagonal(self, f: Oracle, d: Vector) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Yield ``T`` (a new tensor; ``None`` where it is 1) and the entry of ``d``, parameter by parameter."""
        for w, on, t in zip(f.w.tensors, self.on(f), d.materialised(), strict=True):
            yield (wide(w).abs().add_(self.eta) if on and w is not None and t is not None else None), t


@dataclass(frozen=True)
class Fisher:
    """``F^-1 d / sqrt(d F^-1 d)``, ``F = diag(1 + eta d^2)``: Fisher SAM (arXiv 2206.04920).

    Then ``eps F eps = rho^2``. The Fisher matrix is the diagonal of the batch gradient's square, regularised by the
    identity. It is not invariant to the scale of the loss.

    Args:
        eta: the weight of the squared gradient beside the identity, at least 0.

    Raises:
        ValueError: ``eta`` is negative.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        checks.non_negative("eta", self.eta)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        F_inverse_d = d.map(self._precondition)
        return F_inverse_d / (d.dot(F_inverse_d).sqrt() + TINY)

    def _precondition(self, d: Tensor) -> Tensor:
        return d / (1 + self.eta * d * d)


@dataclass(frozen=True)
class LossBudget:
    """``min(sigma / (rho norm(d)), 1) d / norm(d)``: LE-SAM (arXiv 2605.10183), whose ``rho`` is the largest radius.

    ``eps`` then has the length ``min(sigma / norm(d), rho)``, with which the loss rises by ``sigma`` to first order. Of
    groups with several radii the largest counts, and the others keep their proportion.

    Args:
        sigma: the rise of the loss; a number, or a schedule of :mod:`steppe.schedule`, which is asked with the first
            parameter group.

    Raises:
        ValueError: ``sigma`` is negative, or a schedule's answer is, in ``step``.
    """

    sigma: float | Schedule = 0.35

    def __post_init__(self) -> None:
        check_scheduled("sigma", self.sigma)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        norm = d.norm() + TINY
        budget = scheduled(self.sigma, f.step, f.group, "sigma") / (f.rho.largest() + TINY)
        return (budget / norm).clamp(max=1.0) / norm * d


@dataclass(frozen=True)
class Accumulated:
    """``d / sqrt(s)``, ``s <- s + norm(d)^2``: the ascent of LightSAM (arXiv 2505.24399), by the rule of AdaGrad-Norm.

    The first step has the length 1, so ``rho`` is the first radius; where norms stay alike, step ``t`` has the length
    ``1 / sqrt(t)``. ``s`` is remembered in the parameter groups.
    """

    declares: ClassVar[Declaration] = Declaration(numbers=frozenset({"squares"}))

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        squares = d.norm() ** 2 + f.recall_number("squares", default=0.0)
        f.remember_number("squares", squares)
        return d / (squares.sqrt() + TINY)


@dataclass(frozen=True)
class Preconditioned:
    """``M^-1 d / norm(M^-1 d)``, ``M = sqrt(v) + damping``, ``v`` the base optimizer's second moment.

    Preconditioned SAM (arXiv 2502.02407). ``v`` is ``exp_avg_sq`` (Adam and its relatives) or ``square_avg`` (RMSprop),
    as the base's last step left it, without a correction of its bias, which is one factor and cancels. Before the
    base's first step ``M`` is 1. Later, a parameter that has no moment yet takes no part, and neither does an entry
    whose moment is 0: its gradient has been 0 so far (the rows of an embedding that no batch has read), and
    ``1 / damping`` would give it nearly all of ``eps``. Where only some of several base optimizers keep ``v``, the
    optimizer warns once.

    Args:
        damping: added to ``sqrt(v)``, above 0.

    Raises:
        ValueError: ``damping`` is not above 0.
    """

    damping: float = 1e-8

    declares: ClassVar[Declaration] = Declaration(base_state=frozenset({"exp_avg_sq", "square_avg"}))

    def __post_init__(self) -> None:
        checks.positive("damping", self.damping)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        v = f.base_state("exp_avg_sq") + f.base_state("square_avg")
        if v.present():
            d = d.map(self._precondition, v)
        return d / (d.norm() + TINY)

    def _precondition(self, d: Tensor, v: Tensor) -> Tensor:
        return torch.where(v > 0, d / (v.sqrt() + self.damping), 0.0)
