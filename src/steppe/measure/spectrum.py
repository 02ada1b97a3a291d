"""Eigenvalues and eigenvectors of a matrix known by its products."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.measure.krylov import lanczos
from steppe.measure.operator import Symmetric
from steppe.measure.vectors import gaussian, unit

ROUNDING = 1e-6  # of the largest absolute eigenvalue: a residual that small is as good as 0
Which = Literal["largest", "smallest", "magnitude"]


class NotConverged(UserWarning):
    """An estimate missed its tolerance; its result says so too."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues, the wanted end first.

    Attributes:
        values: ``lambda``, in units of loss per squared weight for a Hessian.
        vectors: one unit vector each.
        residuals: ``norm(A v - lambda v)``: an eigenvalue lies within this distance of ``lambda``.
        converged: whether all met the tolerance.
        products: products with the matrix that it took.
    """

    values: tuple[float, ...]
    vectors: tuple[Vector, ...]
    residuals: tuple[float, ...]
    converged: bool
    products: int

    @property
    def value(self) -> float:
        """The first eigenvalue."""
        return self.values[0]


def power_iteration(A: Symmetric, tol: float = 1e-3, most: int = 100, seed: int = 0) -> Eigenpairs:
    """The eigenvalue that is largest in *absolute value*: ``v <- A v / norm(A v)``, ``lambda = <v, A v>``.

    What WSAM's Table 9 names (arXiv 2305.15817; its settings are not known to us), with PyHessian's rule: stop when
    ``lambda`` changes by less than ``tol`` of itself. On ``diag(5, -7, 1)`` it finds -7; :func:`eigenpairs` tells the
    ends of the spectrum apart and needs fewer products.

    Args:
        A: an operator.
        tol: relative change of ``lambda`` in one iteration.
        most: iterations at most; beyond, the result is not converged and a :class:`NotConverged` warning says so.
        seed: of the Gaussian start.
    """
    checks.number("tol", tol, "a number > 0", low=1e-30)
    checks.positive_integer("most", most)
    v = unit(gaussian(A.like, torch.Generator().manual_seed(seed)))
    before, converged = float("inf"), False
    for products in range(1, most + 1):
        Av = A @ v
        value = float(v.dot(Av))
        residual = float((Av - value * v).norm())
        converged = abs(value - before) <= tol * abs(value)
        if converged or products == most:
            break
        v, before = unit(Av), value
    _tell(converged, f"power iteration: lambda = {value:.4g}, residual {residual:.2g} after {products} products")
    return Eigenpairs((value,), (v,), (residual,), converged, products)


def eigenpairs(
    A: Symmetric,
    k: int = 1,
    which: Which = "largest",
    tol: float = 1e-3,
    most: int = 100,
    seed: int = 0,
    start: Vector | None = None,
) -> Eigenpairs:
    """``k`` eigenvalues at one end of the spectrum, by Lanczos with full reorthogonalisation.

    It holds one vector a product. An exactly repeated eigenvalue is found once as long as the Krylov space does not
    close, as by every method that starts from one vector.

    Args:
        A: an operator.
        k: how many.
        which: ``"largest"`` (algebraically), ``"smallest"`` (most negative), or ``"magnitude"``.
        tol: each residual relative to its own eigenvalue; the error of an eigenvalue is of the order of its residual
            squared over the gap to the next. An end of the spectrum near 0 takes many products.
        most: products at most; beyond, the result is not converged and a :class:`NotConverged` warning says so.
        seed: of the Gaussian start.
        start: where to start instead, such as the eigenvector on a part of the data.

    Raises:
        ValueError: ``k`` exceeds the dimension or ``most``, or an argument is out of its range.

    Example:
        >>> top = eigenpairs(Hessian(problem), k=2)
        >>> top.values, top.residuals, top.converged
    """
    checks.positive_integer("k", k)
    checks.positive_integer("most", most)
    checks.number("tol", tol, "a number > 0", low=1e-30)
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f'which must be "largest", "smallest" or "magnitude", got {which!r}')
    if k > (d := min(most, sum(p.numel() for p in A.like))):
        raise ValueError(f"k must be at most the dimension and the products allowed, {d}, got {k}")
    generator = torch.Generator().manual_seed(seed)
    for space in islice(lanczos(A, gaussian(A.like, generator) if start is None else start, generator), most):
        values, S, residuals = space.ritz()
        chosen = _end(values, which)[:k]
        enough = tol * values[chosen].abs() + ROUNDING * values.abs().max()
        converged = len(chosen) == k and bool((residuals[chosen] <= enough).all())
        if converged:
            break
    found = tuple(values[chosen].tolist())
    errors, products = tuple(residuals[chosen].tolist()), len(space.alpha)
    _tell(converged, f"Lanczos: {which} {found}, residuals {errors} after {products} products")
    return Eigenpairs(found, tuple(unit(space.vector(S[:, i])) for i in chosen), errors, converged, products)


def _end(values: Tensor, which: Which) -> list[int]:
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return key.argsort().tolist()


def _tell(converged: bool, what: str) -> None:
    if not converged:
        warnings.warn(f"not converged: {what}", NotConverged, stacklevel=3)
