"""Traces and the alignment of matrices that are known by their products."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.measure.krylov import Symmetric, orthogonal, rademacher, unit
from steppe.measure.spectrum import warn_unless

LEAST = 8  # probes before a standard error is trusted
DEPENDENT = 1e-5  # a sketch vector's share outside the span of earlier ones that is rounding


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws: its value, its standard error, and whether that met the tolerance.

    ``products`` counts those with the matrix, for a pair of matrices with each.
    """

    value: float
    error: float
    converged: bool
    products: int


def hutchinson(A: Symmetric, tol: float = 0.05, most: int = 200, seed: int = 0) -> Estimate:
    """Return ``tr A``, the mean of ``z^T A z`` over Rademacher ``z``, of variance ``2 (norm(A)_F^2 - sum A_ii^2)``.

    Args:
        A: an operator.
        tol: standard error to reach, relative to the value; at least 8 probes are drawn.
        most: maximum number of products; a result that takes more is not converged, and warns so.
        seed: seed of the probes.

    Example:
        >>> trace = hutchinson(Hessian(problem), tol=0.02, most=1000)
        >>> print(f"{trace.value:.1f} +- {trace.error:.1f}, converged: {trace.converged}")
    """
    return _trace(A, 0, tol, most, seed)


def hutch_pp(A: Symmetric, rank: int = 10, tol: float = 0.05, most: int = 200, seed: int = 0) -> Estimate:
    """Return ``tr A`` as ``tr(Q^T A Q)`` plus Hutchinson's estimate on the complement of ``Q``, a basis of ``A S``.

    Hutch++ (Meyer et al. 2021, arXiv 2010.09649) with a sketch ``S`` of ``rank`` Rademacher vectors. Where a few
    eigenvalues dominate, as in a Hessian at a minimum, the estimated remainder has little variance.

    Args:
        A: an operator.
        rank: vectors in the sketch, two products each.
        tol, most, seed: as in :func:`hutchinson`, which this is with rank 0; ``most`` includes the sketch.

    Raises:
        ValueError: ``rank`` leaves fewer than 8 of ``most`` products, or an argument is out of its range.
    """
    checks.positive_integer("rank", rank)
    if most < 2 * rank + LEAST:
        raise ValueError(f"most must be at least 2 rank + {LEAST} = {2 * rank + LEAST}, got {most}")
    return _trace(A, rank, tol, most, seed)


def _trace(A: Symmetric, rank: int, tol: float, most: int, seed: int) -> Estimate:
    _check(tol, most)
    generator = torch.Generator().manual_seed(seed)
    Q: list[Vector] = []
    for v in [A @ rademacher(A.like, generator) for _ in range(rank)]:
        rest = orthogonal(v, Q)
        if rest.norm() > DEPENDENT * v.norm():
            Q.append(unit(rest))
    exact = math.fsum(float(q.dot(A @ q)) for q in Q)
    spent, values = rank + len(Q), list[float]()
    while spent + len(values) < most:
        z = orthogonal(rademacher(A.like, generator), Q)
        values.append(float(z.dot(A @ z)))
        if not math.isfinite(values[-1]):
            raise FloatingPointError("a product with the matrix is not finite")
        value, error = mean_and_error(values)
        if converged := len(values) >= LEAST and error <= tol * abs(exact + value):
            break
    found = Estimate(exact + value, error, converged, spent + len(values))
    warn_unless(converged, f"trace {found}", level=4)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, infinite for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1) if n > 1 else math.inf
    return mean, math.sqrt(variance / n)


def alignment(A: Symmetric, B: Symmetric, tol: float = 0.02, most: int = 200, seed: int = 0) -> Estimate:
    """Return ``tr(A B) / (norm(A)_F norm(B)_F)``, the cosine of two matrices: 1 where ``A = c B``, ``c > 0``.

    ``mean <A z, B z>`` over Rademacher ``z`` over the root of ``mean norm(A z)^2 mean norm(B z)^2``, with the
    jackknife's standard error. For the gradient covariance and the Hessian it tells how far noise points along
    curvature.

    Args:
        A, B: operators on the same weights.
        tol, most, seed: as in :func:`hutchinson`; ``tol`` is absolute, ``most`` counts products with each.

    Example:
        >>> alignment(GradientCovariance(problem), Hessian(problem)).value
    """
    _check(tol, most)
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[float]] = []
    while len(rows) < most:
        z = rademacher(A.like, generator)
        a, b = A @ z, B @ z
        rows.append([float(a.dot(b)), float(a.dot(a)), float(b.dot(b))])
        if len(rows) >= LEAST and (found := _cosine(torch.tensor(rows, dtype=torch.float64)))[1] <= tol:
            break
    value, error = found
    warn_unless(error <= tol, f"alignment {value:.3g} +- {error:.2g}")
    return Estimate(value, error, error <= tol, len(rows))


def _cosine(rows: Tensor) -> tuple[float, float]:
    """Return the cosine and its jackknife standard error."""

    def of(sums: Tensor) -> Tensor:
        return sums[..., 0] / (sums[..., 1] * sums[..., 2]).sqrt()

    n, sums = len(rows), rows.sum(0)
    left_out = of(sums - rows)
    return float(of(sums)), float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())


def _check(tol: float, most: int) -> None:
    checks.positive("tol", tol)
    checks.number("most", most, f"at least {LEAST}", low=LEAST)
