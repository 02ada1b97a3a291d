"""Gradient noise: how the gradients of single examples differ."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from steppe.batch import Batch, mapped
from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.factored import gradient_statistics
from steppe.measure.operator import Symmetric
from steppe.measure.problem import Problem
from steppe.measure.product import DoubleBackward
from steppe.measure.spectrum import NotConverged
from steppe.measure.standin import pure
from steppe.measure.trace import LEAST, Estimate
from steppe.measure.vectors import rademacher

log = logging.getLogger("steppe")
HELD = 2**26  # numbers in the gradients of a chunk of examples under vmap: 256 MB in float32


@dataclass(frozen=True)
class GradientNoise:
    """How the gradients ``g_i`` of ``n`` examples spread around their mean ``g``.

    Attributes:
        norms: ``norm(g_i)`` of every example, shape ``(n,)``, in the order of the data.
        g_norm: ``norm(g)``.
        trace: ``tr V = 1/n sum_i norm(g_i)^2 - norm(g)^2``; times ``n / (n - 1)`` it is unbiased.
        scale: ``tr V / norm(g)^2``, the simple noise scale in examples (McCandlish et al. 2018, arXiv 1812.06162): the
            batch size at which noise and signal are equal. It diverges at a minimum of the very loss that is measured.
    """

    norms: Tensor
    g_norm: float
    trace: float
    scale: float


def gradient_noise(problem: Problem) -> GradientNoise:
    """Per-example gradient norms and tr V.

    From layer factors where the model factors (:func:`steppe.factored.gradient_statistics`), else under ``vmap``, else
    one example after the other.

    Raises:
        ValueError: examples influence one another (batch normalisation in training mode), so that the gradient of one
            is not defined.

    Example:
        >>> noise = gradient_noise(Problem(model, criterion, loader))
        >>> noise.trace, noise.norms.quantile(0.9)
    """
    norms: list[Tensor] = []
    with problem.untouched():
        mixing = [m for m in problem.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        if mixing:
            raise _mixed(f"{type(mixing[0]).__name__} is in training mode")
        for batch in problem.batches():
            norms.append(_norms(problem, batch).cpu())
    g = float(DoubleBackward().gradient(problem).norm())
    every = torch.cat(norms).double()
    trace = float(every.square().mean()) - g**2
    return GradientNoise(every, g, trace, trace / g**2 if g else float("inf"))


def _norms(problem: Problem, batch: Batch) -> Tensor:
    low = problem.w is not problem.parameters  # stand-ins know neither factors nor vmap
    try:
        if not low:
            return gradient_statistics(batch, problem.parameters).norms
    except ValueError as error:
        log.debug("example by example: %s", error)
    try:
        squares, total = _one_by_one(problem, batch) if low else _under_vmap(problem, batch)
    except RuntimeError as error:  # an operation that vmap does not know, or a branch on data
        log.debug("one after the other: %s", error)
        squares, total = _one_by_one(problem, batch)
    g = torch.autograd.grad(batch.losses().sum(), problem.w, allow_unused=True)
    if float((total - Vector(g)).norm()) > 1e-3 * float(squares.sqrt().sum()):
        raise _mixed("their gradients alone do not add up to the batch's")
    return squares.sqrt()


def _under_vmap(problem: Problem, batch: Batch) -> tuple[Tensor, Vector]:
    """Squared norms of every example's gradient, and the gradients' sum."""
    f, w = pure(batch.model, batch.loss, problem.w), [p.detach() for p in problem.w]
    chunk = max(1, HELD // sum(p.numel() for p in w))
    squares, total = [], Vector([None] * len(w))
    per_example: Callable[..., list[Tensor]] = vmap(grad(f), in_dims=(None, 0))
    for part in batch.split(chunk):
        G = per_example(w, mapped(lambda t: t.unsqueeze(1), part.data))
        squares.append(sum(t.flatten(1).square().sum(1) for t in G))
        total = total + Vector([t.sum(0) for t in G])
    return torch.cat(squares), total  # type: ignore[arg-type]


def _one_by_one(problem: Problem, batch: Batch) -> tuple[Tensor, Vector]:
    squares, total = [], Vector([None] * len(problem.w))
    for example in batch.split(1):
        g = Vector(torch.autograd.grad(example.losses().sum(), problem.w, allow_unused=True))
        squares.append(g.norm().square())
        total = total + g
    return torch.stack(squares), total


def _mixed(why: str) -> ValueError:
    return ValueError(
        f"the gradients of single examples are not defined, because examples influence one another: {why}"
    )


def alignment(A: Symmetric, B: Symmetric, tol: float = 0.02, most: int = 200, seed: int = 0) -> Estimate:
    """``tr(A B) / (norm(A)_F norm(B)_F)``, the cosine of two matrices as vectors: 1 where ``A = c B``, ``c > 0``.

    ``mean <A z, B z>`` over Rademacher ``z`` against the root of ``mean norm(A z)^2 mean norm(B z)^2``; the standard
    error is the jackknife's. For the gradient covariance and the Hessian it tells how far noise points along curvature.

    Args:
        A: an operator.
        B: another one on the same weights.
        tol: the standard error to reach; at least 8 probes are drawn.
        most: products with each at most; beyond, the result is not converged and a :class:`NotConverged` warning says
            so.
        seed: of the probes.

    Example:
        >>> alignment(GradientCovariance(problem), Hessian(problem)).value
    """
    checks.number("tol", tol, "a number > 0", low=1e-30)
    checks.number("most", most, f"at least {LEAST}", low=LEAST)
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[float]] = []
    while len(rows) < most:
        z = rademacher(A.like, generator)
        a, b = A @ z, B @ z
        rows.append([float(a.dot(b)), float(a.dot(a)), float(b.dot(b))])
        if len(rows) >= LEAST and (found := _cosine(torch.tensor(rows, dtype=torch.float64)))[1] <= tol:
            break
    value, error = found
    if not (converged := error <= tol):
        warnings.warn(f"not converged: alignment {value:.3g} +- {error:.2g}", NotConverged, stacklevel=2)
    return Estimate(value, error, converged, len(rows))


def _cosine(rows: Tensor) -> tuple[float, float]:
    """The cosine and its jackknife standard error."""

    def of(sums: Tensor) -> Tensor:
        return sums[..., 0] / (sums[..., 1] * sums[..., 2]).sqrt()

    n, sums = len(rows), rows.sum(0)
    left_out = of(sums - rows)
    return float(of(sums)), float(((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt())
