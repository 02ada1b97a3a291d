"""The stochastic differential equations of SGD, USAM and SAM."""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from steppe.engine.vector import TINY
from steppe.pieces.geometry import Euclidean
from steppe.rule import Plain
from steppe.sde.finite_sum import FiniteSum, SDEError
from steppe.sde.scheme import Scheme

LIMIT = 2000  # maximum number of micro-batches


@dataclass(frozen=True)
class Equation:
    """``dX = b(X) dt + sigma(X) dW``, whose paths at time ``k lr`` are distributed nearly as the scheme's ``x_k``.

    With ``E`` over the batches, ``u = g_B + (rho / K) sum_k H_k v_k`` a batch's update to first order in rho, where
    micro-batch ``k`` has the gradient ``g_k`` and the Hessian ``H_k``, and ``v_k = g_k`` (USAM), ``g_k / norm(g_k)``
    (SAM), or the same of the full gradient (n-form):

        b = -E u,    sigma sigma^T = lr Cov u,    corrected: b - (lr / 2) b' b.

    The drift ``-E u`` is minus the gradient of a regularised loss, whose terms :class:`Regularisers` has by theorem.
    The diffusion is the covariance of the whole batch's update, for the m-form with replacement ``m / size`` times
    that of one micro-batch's (theorem 3.5). The drift leaves out O(rho^2). Without the correction the equation has
    weak order 1 in lr, with it order 2 in lr at fixed rho up to that remainder (Li, Tai and E, arXiv 1511.06251, for
    SGD; for the others derived).

    Args:
        problem: a finite sum that is small enough for its Hessians and for all micro-batches.
        scheme: the optimizer that is approximated.
        corrected: whether the drift has its term of order ``lr``, for SGD ``-lr/4 grad norm(grad f)^2``.

    Raises:
        SDEError: the micro-batches are too many, or the batch is larger than the data.

    Example:
        >>> equation = Equation(problem, Scheme(Rule(geometry=Unnormalised()), lr=0.1, rho=0.05, size=2))
        >>> b, sigma = equation.drift(x), equation.diffusion(x)
    """

    problem: FiniteSum
    scheme: Scheme
    corrected: bool = False

    def __post_init__(self) -> None:
        _ = self.sampling  # raises now if the micro-batches cannot be enumerated

    @cached_property
    def sampling(self) -> "Sampling":
        """Return the micro-batches with their probabilities."""
        return sampling(len(self.problem), self.scheme)

    def updates(self, x: Tensor) -> Tensor:
        """Return every micro-batch's update to first order in rho, ``g_k + rho H_k v_k``, shape ``(U, d)``."""
        parts, rule = self.sampling.parts.to(x), self.scheme.inner
        g_i = self.problem.gradients(x)
        g_k = parts @ g_i
        if isinstance(rule, Plain) or self.scheme.rho == 0:
            return g_k
        H_k = torch.einsum("un,nde->ude", parts, self.problem.hessians(x))
        v = g_i.mean(0).expand_as(g_k) if self.scheme.full else g_k
        if isinstance(rule.geometry, Euclidean):
            v = v / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + TINY)
        return g_k + self.scheme.rho * torch.einsum("ude,ue->ud", H_k, v)

    def drift(self, x: Tensor) -> Tensor:
        """Return ``b(x)``, shape ``(d,)``, at ``x`` of shape ``(d,)``."""
        return self.coefficients(x)[0]

    def diffusion(self, x: Tensor) -> Tensor:
        """Return ``sigma(x)``, shape ``(d, r)``, one column for each of ``r`` independent Brownian motions."""
        return self.coefficients(x)[1]

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return drift and diffusion, which share the updates."""

        def drift(u: Tensor) -> Tensor:
            return -(self.sampling.mean.to(u) @ u)

        u = self.updates(x)
        b, sigma = drift(u), -(self.scheme.lr**0.5) * u.mT @ self.sampling.factor.to(x)
        if self.corrected:
            pull = vjp(lambda x: drift(self.updates(x)), x)[1]
            (b_prime_b,) = pull(b)  # b is a gradient, so b' is symmetric
            b = b - self.scheme.lr / 2 * b_prime_b
        return b, sigma

    def step(self, x: Tensor, h: float, dW: Tensor) -> Tensor:
        """Return paths ``x``, shape ``(paths, d)``, after a step of Euler-Maruyama, ``x + b(x) h + sigma(x) dW``."""
        b, sigma = vmap(self.coefficients)(x)
        end: Tensor = x + h * b + torch.einsum("pdr,pr->pd", sigma, dW)
        return end


class Sampling(NamedTuple):
    """Every micro-batch of ``m`` out of ``n`` examples.

    A batch of ``K = size / m`` micro-batches is a random vector of weights ``B``: ``1 / K`` for each micro-batch that
    it holds (one that is drawn twice counts twice). If ``p`` has a row for each micro-batch, a batch's mean is ``B p``.

    Attributes:
        parts: shape ``(U, n)``, row ``u`` averages the examples of micro-batch ``u``.
        mean: ``E B``, its probabilities, shape ``(U,)``.
        factor: shape ``(U, r)``, ``factor factor^T = Cov B``. Its first ``n`` columns belong to the examples and carry
            the part common to all micro-batches with example ``i``. The other columns carry the remainder.
    """

    parts: Tensor
    mean: Tensor
    factor: Tensor


def sampling(n: int, scheme: Scheme) -> Sampling:
    """Return the micro-batches of a scheme's batches, enumerated.

    Without replacement every set of ``m`` is equally likely, two micro-batches of one batch are disjoint, and so
    ``E B_u B_v = 1 / (K U)`` for ``u = v``, ``(K - 1) / (K U C(n - m, m))`` for disjoint ``u`` and ``v``, else 0. With
    replacement micro-batches are independent: ``Cov B = (diag(p) - p p^T) / K``.

    Raises:
        SDEError: the batch is larger than the data, or there are more than ``LIMIT`` micro-batches.
    """
    if scheme.size > n and not scheme.replacement:
        raise SDEError(f"size must be at most the number of examples, got batches of {scheme.size} out of {n}")
    m, K = scheme.m, scheme.size // scheme.m
    count = math.comb(n + m - 1, m) if scheme.replacement else math.comb(n, m)
    if count > LIMIT:
        raise SDEError(
            f"{count} micro-batches of {m} out of {n} examples are too many to enumerate, the limit is {LIMIT}"
        )
    choose = combinations_with_replacement if scheme.replacement else combinations
    index = torch.tensor(list(choose(range(n), m)))
    held = torch.zeros(count, n, dtype=torch.float64).scatter_add_(1, index, torch.ones(count, m, dtype=torch.float64))
    if scheme.replacement:
        p = (math.lgamma(m + 1) - torch.lgamma(held + 1).sum(1) - m * math.log(n)).exp()  # multinomial
        covariance = (torch.diag(p) - p.outer(p)) / K
    else:
        p = torch.full((count,), 1 / count, dtype=torch.float64)
        disjoint = (held @ held.T == 0).double()
        pairs = (K - 1) / (K * count * max(1, math.comb(n - m, m)))
        covariance = torch.eye(count, dtype=torch.float64) / (K * count) + pairs * disjoint - p.outer(p)
    return Sampling(held / m, p, _factor(covariance, held / m))


def _factor(covariance: Tensor, parts: Tensor) -> Tensor:
    """Return ``[F, R]``, ``F F^T`` the part of the covariance that the examples' weights ``parts^T B`` explain.

    Examples are exchangeable, so ``Cov(parts^T B) = s (I - 1 1^T / n)`` and ``F = Cov(B, parts^T B) / sqrt(s)``.
    """
    across = covariance @ parts
    s = torch.trace(parts.T @ across) / max(1, parts.shape[1] - 1)
    F = across / s.sqrt() if s > 1e-14 else torch.zeros_like(across)
    values, vectors = torch.linalg.eigh(covariance - F @ F.T)
    kept = values > 1e-12 * covariance.diagonal().max()
    return torch.cat([F, vectors[:, kept] * values[kept].sqrt()], dim=1)
