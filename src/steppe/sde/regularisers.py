"""Values and gradients of the implicit regularisers, on any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value

from steppe.engine import checks
from steppe.sde.finite_sum import FiniteSum, SDEError


@dataclass(frozen=True)
class Term:
    """The value of a term of a regularised loss, shape ``()``, and its gradient, shape ``(d,)``, by autograd."""

    value: Tensor
    gradient: Tensor

    def __add__(self, other: Term) -> Term:
        return Term(self.value + other.value, self.gradient + other.gradient)


@dataclass(frozen=True)
class Regularisers:
    """The terms of the losses that the drifts descend (arXiv 2509.18001).

    Attributes:
        loss: ``f``, what SGD descends.
        gradient: ``rho/2 norm(grad f)^2``: ``loss + gradient`` is n-USAM's (theorem 3.4).
        variance: ``rho c / (2 m) tr V``: ``loss + gradient + variance`` is m-USAM's (3.5), with ``m`` the batch size
            mini-batch USAM's (3.3). ``c = (n - m) / (n - 1)`` without replacement (derived), 1 with.
        full_norm: ``rho norm(grad f)``: ``loss + full_norm`` is n-SAM's (3.6, derived).
        norm: ``rho E norm(grad f_I)``, ``I`` of ``m`` examples: ``loss + norm`` is m-SAM's (3.8).
    """

    loss: Term
    gradient: Term
    variance: Term
    full_norm: Term
    norm: Term


def regularisers(
    problem: FiniteSum,
    x: Tensor,
    rho: float,
    m: int,
    replacement: bool = False,
    repeats: int = 8,
    generator: torch.Generator | None = None,
) -> Regularisers:
    """Return every term at ``x`` with its gradient.

    All are exact except ``norm``, an average over random micro-batches: ``repeats`` permutations cut into parts of
    ``m``, so that every example counts equally (with replacement, as many independent draws). With ``m`` 1 or ``n`` and
    without replacement it is exact too. All per-example gradients are held at once: ``n d`` numbers and their graph.

    Args:
        problem: the finite sum; :func:`~steppe.sde.problem_of` makes one of a model and its data.
        x: the point, shape ``(d,)``.
        rho: the radius.
        m: number of examples that share a perturbation.
        replacement: whether micro-batches are drawn with replacement.
        repeats: number of random partitions.
        generator: source of the partitions.

    Raises:
        SDEError: ``m`` is larger than the data without replacement; a loss or gradient is not finite.
        ValueError: ``rho``, ``m`` or ``repeats`` is out of its range.

    Example:
        >>> terms = regularisers(*problem_of(batch), rho=0.05, m=8)
        >>> drift = -(terms.loss + terms.norm).gradient
    """
    checks.non_negative("rho", rho)
    checks.positive_integer("m", m)
    checks.positive_integer("repeats", repeats)
    n, orders = len(problem), 1 if m in (1, len(problem)) else repeats
    if m > n and not replacement:
        raise SDEError(f"m must be at most the number of examples, got {m} of {n}")
    problem.check(x)
    if replacement:
        index = torch.randint(n, (repeats * max(1, n // m), m), generator=generator)
    else:
        index = torch.cat([torch.randperm(n, generator=generator)[: n - n % m].view(-1, m) for _ in range(orders)])
    c = 1.0 if replacement else (n - m) / max(1, n - 1)

    def term(of: Callable[[Tensor], Tensor]) -> Term:
        gradient, value = grad_and_value(lambda x: of(problem.gradients(x)))(x)
        return Term(value, gradient)

    gradient, loss = grad_and_value(lambda x: problem.losses(x).mean())(x)
    return Regularisers(
        loss=Term(loss, gradient),
        gradient=term(lambda g_i: rho / 2 * g_i.mean(0).square().sum()),
        variance=term(lambda g_i: rho * c / (2 * m) * (g_i - g_i.mean(0)).square().sum(1).mean()),
        full_norm=term(lambda g_i: rho * g_i.mean(0).square().sum().sqrt()),
        norm=term(lambda g_i: rho * g_i[index].mean(1).square().sum(1).sqrt().mean()),
    )
