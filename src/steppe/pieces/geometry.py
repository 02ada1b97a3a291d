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

Which = Callable[[Oracle], list[bool]]  # which parameters are adaptive


@dataclass(frozen=True)
class Euclidean:
    """``d / norm(d)``, the norm over all perturbed parameters together (SAM, arXiv 2010.01412, equation 2)."""

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
class Matrices:
    """Parameters with two or more dimensions: weights of linear, convolution and embedding layers."""

    def __call__(self, f: Oracle) -> list[bool]:
        return [w is not None and w.dim() > 1 for w in f.w.tensors]


@dataclass(frozen=True)
class Named:
    """Parameters whose name contains ``part``: with "weight" the ASAM authors' choice, normalisation weights included.

    Raises:
        TypeError: in ``step``, where the base optimizer was not made from ``model.named_parameters()``.
    """

    part: str = "weight"

    def __call__(self, f: Oracle) -> list[bool]:
        if f.names is None:
            raise TypeError(
                f"Named({self.part!r}) needs parameter names: make the base optimizer from model.named_parameters()"
            )
        return [self.part in name for name in f.names]


@dataclass(frozen=True)
class Everything:
    """Every parameter, biases included: the choice of the widely copied davda54/sam. Its rho is not ASAM's."""

    def __call__(self, f: Oracle) -> list[bool]:
        return [True] * len(f.w.tensors)


@dataclass(frozen=True)
class Adaptive:
    """``T^2 d / norm(T d)``, ``T = abs(w) + eta`` on the parameters ``on``, 1 on the rest: ASAM (arXiv 2102.11600).

    Then ``norm(T^-1 eps) = rho``: the ball follows the scale of each weight, so rho is some ten times SAM's.

    The authors adapt parameters whose name contains "weight" and leave biases plain. The default chooses by dimension,
    which needs no names: it differs for the weights of normalisation layers, which the authors adapt too
    (``on=Named("weight")`` is theirs to the letter, ``on=Everything()`` with ``eta=0`` is davda54/sam's).

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
