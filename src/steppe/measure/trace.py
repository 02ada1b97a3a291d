"""The trace of a matrix known by its products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.measure.operator import Symmetric
from steppe.measure.spectrum import NotConverged
from steppe.measure.vectors import orthogonal, orthonormal, rademacher

LEAST = 8  # probes before a standard error is believed


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws.

    Attributes:
        value: the mean.
        error: its standard error.
        converged: whether the error met the tolerance.
        products: products with the matrix (or, of a pair of matrices, with each) that it took.
    """

    value: float
    error: float
    converged: bool
    products: int


def hutchinson(A: Symmetric, tol: float = 0.05, most: int = 200, seed: int = 0) -> Estimate:
    """``tr A ~ mean of z^T A z`` over Rademacher ``z``; the variance of one is ``2 (norm(A)_F^2 - sum_i A_ii^2)``.

    Args:
        A: an operator.
        tol: the standard error to reach, relative to the value; at least 8 probes are drawn.
        most: products at most; beyond, the result is not converged and a :class:`NotConverged` warning says so.
        seed: of the probes.

    Example:
        >>> trace = hutchinson(Hessian(problem), tol=0.02, most=1000)
        >>> print(f"{trace.value:.1f} +- {trace.error:.1f}, converged: {trace.converged}")
    """
    probes = _Probes(A, seed)
    return _mean(lambda: (z := probes.draw()).dot(A @ z), 0.0, 0, tol, most)


def hutch_pp(A: Symmetric, rank: int = 10, tol: float = 0.05, most: int = 200, seed: int = 0) -> Estimate:
    """``tr(Q^T A Q)`` exactly, plus Hutchinson's estimate on the complement of ``Q``, an orthonormal basis of ``A S``.

    Hutch++ (Meyer et al. 2021, arXiv 2010.09649) with a sketch ``S`` of ``rank`` Rademacher vectors. Where a few
    eigenvalues dominate, as in a Hessian at a minimum, what is left to estimate has little variance.

    Args:
        A: an operator.
        rank: vectors in the sketch; it costs two products each.
        tol: as in :func:`hutchinson`, which this is with rank 0.
        most: products at most, those of the sketch included.
        seed: of sketch and probes.

    Raises:
        ValueError: ``rank`` leaves fewer than 8 of ``most`` products, or an argument is out of its range.
    """
    checks.positive_integer("rank", rank)
    if most < 2 * rank + LEAST:
        raise ValueError(f"most must be at least 2 rank + {LEAST} = {2 * rank + LEAST}, got {most}")
    probes = _Probes(A, seed)
    Q = orthonormal([A @ probes.draw() for _ in range(rank)])
    known = math.fsum(float(q.dot(A @ q)) for q in Q)

    def rest() -> torch.Tensor:
        z = orthogonal(probes.draw(), Q)
        return z.dot(A @ z)

    return _mean(rest, known, rank + len(Q), tol, most)


class _Probes:
    def __init__(self, A: Symmetric, seed: int) -> None:
        self.like, self.generator = A.like, torch.Generator().manual_seed(seed)

    def draw(self) -> Vector:
        return rademacher(self.like, self.generator)


def _mean(draw: Callable[[], torch.Tensor], known: float, spent: int, tol: float, most: int) -> Estimate:
    checks.number("tol", tol, "a number > 0", low=1e-30)
    checks.number("most", most, f"at least {LEAST}", low=LEAST)
    values: list[float] = []
    while spent + len(values) < most:
        values.append(float(draw()))
        if not math.isfinite(values[-1]):
            raise FloatingPointError("a product with the matrix is not finite")
        value, error = mean_and_error(values)
        if converged := len(values) >= LEAST and error <= tol * abs(known + value):
            break
    found = Estimate(known + value, error, converged, spent + len(values))
    if not converged:
        warnings.warn(f"not converged: trace {found}", NotConverged, stacklevel=3)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, infinite for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1) if n > 1 else math.inf
    return mean, math.sqrt(variance / n)
