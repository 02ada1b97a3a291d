"""The stochastic differential equations of SGD, USAM and SAM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import vjp

from steppe.engine.vector import TINY
from steppe.sde.finite_sum import FiniteSum
from steppe.sde.sampling import Sampling, sampling
from steppe.sde.scheme import Scheme


@dataclass(frozen=True)
class Equation:
    """``dX = b(X) dt + sigma(X) dW``, whose paths at time ``k lr`` are distributed nearly as the scheme's ``x_k``.

    With ``E`` over the batches, ``u = g_B + (rho / K) sum_k H_k v_k`` a batch's update to first order in rho, where
    micro-batch ``k`` has the gradient ``g_k`` and the Hessian ``H_k``, and ``v_k = g_k`` (USAM), ``g_k / norm(g_k)``
    (SAM), or the same of the full gradient (n-form):

        b = -E u,    sigma sigma^T = lr Cov u,    corrected: b - (lr / 2) b' b.

    The drift ``-E u`` is minus the gradient of a regularised loss, with ``V`` the covariance of the per-example
    gradients and ``c = 1`` with replacement, ``(n - m) / (n - 1)`` without (arXiv 2509.18001; the factor is derived):

    | form | of | theorem |
    | --- | --- | --- |
    | USAM, mini-batch (m = size) and m | ``f + rho/2 norm(grad f)^2 + rho c / (2 m) tr V`` | 3.3, 3.5 |
    | n-USAM | ``f + rho/2 norm(grad f)^2`` | 3.4 |
    | SAM, mini-batch and m | ``f + rho E norm(grad f_I)``, ``I`` of ``m`` examples | 3.7, 3.8 |
    | n-SAM | ``f + rho norm(grad f)`` | 3.6, derived |

    The diffusion is the covariance of the whole batch's update, for the m-form with replacement ``m / size`` times that
    of one micro-batch's (3.5). The drift leaves out O(rho^2). Without the correction the equation has weak order 1
    in lr, with it order 2 in lr at fixed rho up to that remainder (Li, Tai and E, arXiv 1511.06251, for SGD; for the
    others derived).

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
    def sampling(self) -> Sampling:
        """Return the micro-batches with their probabilities."""
        return sampling(len(self.problem), self.scheme)

    def updates(self, x: Tensor) -> Tensor:
        """Return every micro-batch's update to first order in rho, ``g_k + rho H_k v_k``, shape ``(U, d)``."""
        parts = self.sampling.parts.to(x)
        g_i = self.problem.gradients(x)
        g_k = parts @ g_i
        if not self.scheme.perturbed:
            return g_k
        H_k = torch.einsum("un,nde->ude", parts, self.problem.hessians(x))
        v = g_i.mean(0).expand_as(g_k) if self.scheme.full else g_k
        if self.scheme.normalised:
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
        u = self.updates(x)
        b, sigma = self._mean(u), -(self.scheme.lr**0.5) * u.mT @ self.sampling.factor.to(x)
        if self.corrected:
            pull = vjp(lambda x: self._mean(self.updates(x)), x)[1]
            (b_prime_b,) = pull(b)  # b is a gradient, so b' is symmetric
            b = b - self.scheme.lr / 2 * b_prime_b
        return b, sigma

    def _mean(self, u: Tensor) -> Tensor:
        """Return ``-E u``."""
        return -(self.sampling.mean.to(u) @ u)
