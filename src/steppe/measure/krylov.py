"""Random vectors, orthogonalisation, and the Lanczos process."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from steppe.engine.vector import TINY, Vector, shard_like, wide

BREAKDOWN = 1e-6  # relative to the largest entry of T: a smaller remainder of a product is rounding


class Symmetric(Protocol):
    """A symmetric matrix as the estimators use it: by its products with vectors."""

    @property
    def like(self) -> Sequence[Tensor]:
        """Return tensors with the shapes of a vector's entries."""

    def __matmul__(self, v: Vector, /) -> Vector: ...


def gaussian(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Return ``z ~ N(0, I)``."""
    return _drawn(like, lambda shape: torch.randn(shape, generator=generator))


def rademacher(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Return ``z`` with entries +1 and -1, equally likely."""
    return _drawn(like, lambda shape: torch.randint(2, shape, generator=generator) * 2.0 - 1.0)


def uniform(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Return ``z`` uniform in the cube ``[-1, 1]^d``."""
    return _drawn(like, lambda shape: torch.rand(shape, generator=generator) * 2 - 1)


def _drawn(like: Sequence[Tensor], draw: Callable[[torch.Size], Tensor]) -> Vector:
    """Draw whole tensors on the CPU, so that all devices, ranks and types get the same numbers."""
    return Vector([shard_like(draw(p.shape).to(p.device, wide(p.new_empty(0)).dtype), p) for p in like])


def unit(v: Vector) -> Vector:
    """Return ``v / norm(v)``."""
    return Vector((v / (float(v.norm()) + TINY)).materialised())


def orthogonal(v: Vector, basis: Sequence[Vector]) -> Vector:
    """Return ``v`` without its part in the span of an orthonormal basis, by Gram-Schmidt twice."""
    for _ in range(2):
        for q in basis:
            v = v - float(v.dot(q)) * q  # a number, because sharded tensors do not mix with others
    return v


@dataclass
class Krylov:
    """``A Q = Q T + beta_j q_{j+1} e_j^T``, ``T`` tridiagonal with ``alpha`` on and ``beta`` beside the diagonal."""

    basis: list[Vector]
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)  # one more than T has: the last couples to the next basis vector

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the eigenvalues of ``T``, ascending, its eigenvectors as columns, and each pair's residual norm."""
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, S = torch.linalg.eigh(T)
        return values, S, self.beta[-1] * S[-1].abs()

    def vector(self, s: Tensor) -> Vector:
        """Return ``Q s``."""
        terms: list[Vector] = [c * q for c, q in zip(s.tolist(), self.basis, strict=False)]
        return reduce(Vector.__add__, terms)


def lanczos(A: Symmetric, start: Vector, generator: torch.Generator) -> Iterator[Krylov]:
    """Grow a Krylov space from ``start`` with full reorthogonalisation, one product at a time, to full dimension.

    Where the space closes (the remainder is rounding) it continues from a random vector orthogonal to it. So repeated
    eigenvalues are found too, and those whose eigenvectors are orthogonal to ``start``.

    Raises:
        FloatingPointError: a product is not finite.
    """
    space, d = Krylov([unit(start)]), sum(p.numel() for p in A.like)
    for size in range(1, d + 1):
        Aq = A @ space.basis[-1]
        alpha = float(Aq.dot(space.basis[-1]))
        if not math.isfinite(alpha):
            raise FloatingPointError(f"product {size} with the matrix is not finite")
        space.alpha.append(alpha)
        rest = orthogonal(Aq, space.basis)
        beta = float(rest.norm())
        closed = beta <= BREAKDOWN * max(map(abs, space.alpha + space.beta))
        space.beta.append(0.0 if closed else beta)
        yield space
        if size < d:
            space.basis.append(unit(orthogonal(gaussian(A.like, generator), space.basis) if closed else rest))
