"""All micro-batches of a random batch, their probabilities, and the covariance of a batch's weights on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import torch
from torch import Tensor

from steppe.sde.finite_sum import SDEError
from steppe.sde.scheme import Scheme

LIMIT = 2000  # maximum number of micro-batches


@dataclass(frozen=True)
class Sampling:
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
        log_p = math.lgamma(m + 1) - torch.lgamma(held + 1).sum(1) - m * math.log(n)  # multinomial
        p = log_p.exp()
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
    n = parts.shape[1]
    across = covariance @ parts
    s = torch.trace(parts.T @ across) / max(1, n - 1)
    F = across / s.sqrt() if s > 1e-14 else torch.zeros_like(across)
    values, vectors = torch.linalg.eigh(covariance - F @ F.T)
    kept = values > 1e-12 * covariance.diagonal().max()
    return torch.cat([F, vectors[:, kept] * values[kept].sqrt()], dim=1)
