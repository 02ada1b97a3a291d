"""The Lanczos process with full reorthogonalisation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steppe.engine.vector import Vector
from steppe.measure.operator import Symmetric
from steppe.measure.vectors import gaussian, orthogonal, unit

BREAKDOWN = 1e-6  # of the largest entry of T: what is left of a product is rounding


@dataclass
class Krylov:
    """``A Q = Q T + beta_j q_{j+1} e_j^T``, ``T`` tridiagonal with ``alpha`` on and ``beta`` beside the diagonal."""

    basis: list[Vector]
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)  # the last one couples to what is not in the basis yet
    exhausted: bool = False  # the basis spans all there is

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of ``T`` in ascending order, its eigenvectors as columns, and each pair's residual norm."""
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
        values, S = torch.linalg.eigh(T)
        return values, S, self.beta[-1] * S[-1].abs()

    def vector(self, s: Tensor) -> Vector:
        """``Q s``."""
        total = float(s[0]) * self.basis[0]
        for c, q in zip(s.tolist()[1:], self.basis[1 : len(s)], strict=True):
            total = total + c * q
        return total


def lanczos(A: Symmetric, start: Vector, generator: torch.Generator) -> Iterator[Krylov]:
    """Grow a Krylov space from ``start``, one product at a time, until it is all there is.

    Where the space closes (the remainder is rounding) it goes on from a random vector orthogonal to it, so that
    repeated eigenvalues and others that ``start`` has no part in are found too.

    Raises:
        FloatingPointError: a product is not finite.
    """
    space, d = Krylov([unit(start)]), sum(p.numel() for p in A.like)
    while True:
        q = space.basis[-1]
        Aq = A @ q
        alpha = float(Aq.dot(q))
        if not math.isfinite(alpha):
            raise FloatingPointError(f"product {len(space.basis)} with the matrix is not finite")
        space.alpha.append(alpha)
        rest = orthogonal(Aq, space.basis)
        beta = float(rest.norm())
        scale = max(map(abs, space.alpha + space.beta))
        closed = beta <= BREAKDOWN * scale
        space.beta.append(0.0 if closed else beta)
        space.exhausted = len(space.basis) >= d
        yield space
        if space.exhausted:
            return
        space.basis.append(unit(orthogonal(gaussian(A.like, generator), space.basis) if closed else rest))
