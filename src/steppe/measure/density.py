"""The spectral density of a matrix known by its products."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.measure.krylov import lanczos
from steppe.measure.operator import Symmetric
from steppe.measure.spectrum import NotConverged
from steppe.measure.vectors import gaussian


@dataclass(frozen=True)
class Density:
    """A probability density over eigenvalues, as one quadrature rule a probe.

    Attributes:
        nodes: one tensor of eigenvalue estimates a probe.
        weights: their shares; each probe's add up to 1.
        residual: the largest residual of the extreme nodes, relative to the largest absolute node.
        converged: whether it met the tolerance: the ends of the spectrum are where the outermost nodes say.
        products: products with the matrix that it took.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    residual: float
    converged: bool
    products: int

    def moment(self, power: int) -> tuple[float, float]:
        """``tr(A^power) / d`` and its standard error over the probes; exact in the mean below twice the steps."""
        each = torch.stack([w @ x**power for x, w in zip(self.nodes, self.weights, strict=True)])
        return float(each.mean()), float(each.std() / math.sqrt(len(each))) if len(each) > 1 else math.inf

    def on(self, grid: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """The density on ``grid``, smoothed by a Gaussian of standard deviation ``width``, and its standard error."""
        checks.number("width", width, "a number > 0", low=1e-30)
        normal = torch.distributions.Normal(0.0, width)
        rows = [
            (normal.log_prob(grid.double()[:, None] - x).exp() * w).sum(1)
            for x, w in zip(self.nodes, self.weights, strict=True)
        ]
        each = torch.stack(rows)
        error = each.std(0) / math.sqrt(len(each)) if len(each) > 1 else torch.full_like(each[0], math.inf)
        return each.mean(0), error


def spectral_density(A: Symmetric, probes: int = 8, steps: int = 40, tol: float = 1e-2, seed: int = 0) -> Density:
    """Stochastic Lanczos quadrature: nodes are eigenvalues of ``T``, weights the squared first entries of its vectors.

    ``steps`` Lanczos steps from each of ``probes`` Gaussian vectors (Ghorbani et al. 2019, arXiv 1901.10159), with full
    reorthogonalisation. The bulk is resolved to about the spectrum's width over ``steps``.

    Args:
        A: an operator.
        probes: random starts; the standard error falls with their square root.
        steps: products a probe at most.
        tol: relative residual at which the ends count as found; beyond, a :class:`NotConverged` warning says so.
        seed: of the probes.
    """
    checks.positive_integer("probes", probes)
    checks.positive_integer("steps", steps)
    checks.number("tol", tol, "a number > 0", low=1e-30)
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, residual, products = [], [], 0.0, 0
    for _ in range(probes):
        for space in islice(lanczos(A, gaussian(A.like, generator), generator), steps):
            if space.beta[-1] == 0:
                break  # the rule is exact
        values, S, residuals = space.ritz()
        nodes.append(values)
        weights.append(S[0].square())
        residual = max(residual, float(residuals[[0, -1]].max() / values.abs().max()))
        products += len(space.alpha)
    if residual > tol:
        warnings.warn(
            f"not converged: ends of the spectral density, residual {residual:.2g}", NotConverged, stacklevel=2
        )
    return Density(tuple(nodes), tuple(weights), residual, residual <= tol, products)
