"""Eigenvalues, eigenvectors and spectral density of a matrix that is known by its products."""

import math
import warnings
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.measure.krylov import Symmetric, gaussian, lanczos, unit

ROUNDING = 1e-6  # relative to the largest absolute eigenvalue: smaller residuals count as 0
Which = Literal["largest", "smallest", "magnitude"]


class NotConverged(UserWarning):
    """Warning that an estimate missed its tolerance; the result's ``converged`` says so too."""


def warn_unless(converged: bool, estimate: str, level: int = 3) -> None:
    """Warn that ``estimate`` has not converged, at the caller of the function that calls this one."""
    if not converged:
        warnings.warn(f"not converged: {estimate}", NotConverged, stacklevel=level)


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues ``lambda`` and unit eigenvectors ``v``, from the requested end of the spectrum inwards.

    An eigenvalue lies within each of the ``residuals``, ``norm(A v - lambda v)``, of its ``lambda``. ``converged`` says
    whether all met the tolerance, ``products`` how many products with the matrix were used.
    """

    values: tuple[float, ...]
    vectors: tuple[Vector, ...]
    residuals: tuple[float, ...]
    converged: bool
    products: int

    @property
    def value(self) -> float:
        """Return the first eigenvalue."""
        return self.values[0]


def power_iteration(A: Symmetric, tol: float = 1e-3, most: int = 100, seed: int = 0) -> Eigenpairs:
    """Return the eigenvalue that is largest in *absolute value*: ``v <- A v / norm(A v)``, ``lambda = <v, A v>``.

    WSAM's Table 9 names this method (arXiv 2305.15817; its settings are not known to us). The stopping rule is
    PyHessian's: ``lambda`` changes by less than ``tol`` of itself. On ``diag(5, -7, 1)`` it finds -7. It takes at most
    ``most`` products from a Gaussian start; :func:`eigenpairs` needs fewer, and distinguishes the ends of the spectrum.

    Args:
        A: the operator, such as :class:`~steppe.measure.Hessian`.
        tol: the relative change of the eigenvalue at which it stops.
        most: the largest number of products.
        seed: of the start.

    Raises:
        ValueError: ``tol`` or ``most`` is not positive.
    """
    checks.positive("tol", tol)
    checks.positive_integer("most", most)
    v = unit(gaussian(A.like, torch.Generator().manual_seed(seed)))
    before, converged = float("inf"), False
    for products in range(1, most + 1):
        Av = A @ v
        value = float(v.dot(Av))
        residual = float((Av - value * v).norm())
        converged = residual == 0 or abs(value - before) <= tol * abs(value)
        if converged or products == most:
            break
        v, before = unit(Av), value
    warn_unless(converged, f"power iteration: lambda = {value:.4g}, residual {residual:.2g} after {products} products")
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
    """Return ``k`` eigenvalues at one end of the spectrum, by Lanczos with full reorthogonalisation.

    It holds one vector for each product. An exactly repeated eigenvalue is found once until the Krylov space closes,
    as by every method that starts from one vector.

    Args:
        A: an operator.
        k: how many eigenvalues.
        which: ``"largest"`` (algebraically), ``"smallest"`` (most negative), or ``"magnitude"``.
        tol: tolerance of each residual, relative to its eigenvalue. The error of an eigenvalue is of the order of its
            squared residual over the gap to the next. An end of the spectrum near 0 takes many products.
        most: maximum number of products; a result that takes more is not converged, and warns so.
        seed: seed of the Gaussian start.
        start: a start instead, such as the eigenvector on a part of the data.

    Raises:
        ValueError: ``k`` exceeds the dimension or ``most``, or an argument is out of its range.

    Example:
        >>> top = eigenpairs(Hessian(problem), k=2)
        >>> top.values, top.residuals, top.converged
    """
    checks.positive_integer("k", k)
    checks.positive_integer("most", most)
    checks.positive("tol", tol)
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f'which must be "largest", "smallest" or "magnitude", got {which!r}')
    if k > (d := min(most, sum(p.numel() for p in A.like))):
        raise ValueError(f"k must be at most the dimension and the products allowed, {d}, got {k}")
    generator = torch.Generator().manual_seed(seed)
    for space in islice(lanczos(A, gaussian(A.like, generator) if start is None else start, generator), most):
        values, S, residuals = space.ritz()
        chosen = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which].argsort()[:k].tolist()
        enough = tol * values[chosen].abs() + ROUNDING * values.abs().max()
        converged = len(chosen) == k and bool((residuals[chosen] <= enough).all())
        if converged:
            break
    found = tuple(values[chosen].tolist())
    errors, products = tuple(residuals[chosen].tolist()), len(space.alpha)
    warn_unless(converged, f"Lanczos: {which} {found}, residuals {errors} after {products} products")
    return Eigenpairs(found, tuple(unit(space.vector(S[:, i])) for i in chosen), errors, converged, products)


@dataclass(frozen=True)
class Density:
    """A probability density over eigenvalues: for each probe a tensor of ``nodes``, and ``weights`` that sum to 1.

    ``residual`` is the largest of the extreme nodes, relative to the largest absolute node. Where ``converged``, it met
    the tolerance: the outermost nodes are the ends of the spectrum. ``products`` counts those with the matrix.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    residual: float
    converged: bool
    products: int

    def on(self, grid: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """Return the density on ``grid``, smoothed by a Gaussian of this width, and its standard error.

        The error is that of the mean over the probes, infinite for a single one.
        """
        checks.positive("width", width)
        normal = torch.distributions.Normal(0.0, width)
        pairs = zip(self.nodes, self.weights, strict=True)
        each = torch.stack([(normal.log_prob(grid.double()[:, None] - x).exp() * w).sum(1) for x, w in pairs])
        n = len(each)
        return each.mean(0), each.std(0) / math.sqrt(n) if n > 1 else torch.full_like(each[0], math.inf)


def spectral_density(A: Symmetric, probes: int = 8, steps: int = 40, tol: float = 1e-2, seed: int = 0) -> Density:
    """Return the spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019, arXiv 1901.10159).

    ``steps`` Lanczos steps from each of ``probes`` Gaussian vectors, with full reorthogonalisation. The nodes are the
    eigenvalues of ``T``, their weights the squared first entries of its eigenvectors. The bulk is resolved to about
    the spectrum's width over ``steps``.

    Args:
        A: an operator.
        probes: random starts; the standard error falls with their square root.
        steps: maximum number of products for each probe.
        tol: relative residual at which the ends count as found; above it there is a :class:`NotConverged` warning.
        seed: seed of the probes.
    """
    checks.positive_integer("probes", probes)
    checks.positive_integer("steps", steps)
    checks.positive("tol", tol)
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, residual, products = [], [], 0.0, 0
    for _ in range(probes):
        for space in islice(lanczos(A, gaussian(A.like, generator), generator), steps):
            if space.beta[-1] == 0:
                break  # the quadrature is exact
        values, S, residuals = space.ritz()
        nodes.append(values)
        weights.append(S[0].square())
        residual = max(residual, float(residuals[[0, -1]].max() / values.abs().max()))
        products += len(space.alpha)
    warn_unless(residual <= tol, f"ends of the spectral density, residual {residual:.2g}")
    return Density(tuple(nodes), tuple(weights), residual, residual <= tol, products)
