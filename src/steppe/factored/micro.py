"""m-SAM in two passes over the whole batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from steppe.batch import Batch, Batches
from steppe.engine.oracle import Oracle
from steppe.engine.passes import RandomState
from steppe.engine.update import Update
from steppe.factored.black_box import black_boxes
from steppe.factored.cost import TWO_PASSES
from steppe.factored.gradients import Harvest
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import fall_back, plan_for
from steppe.factored.record import Factors, factors_of
from steppe.factored.tape import See
from steppe.factored.terms import squared_norms

if TYPE_CHECKING:
    from steppe.rule import Rule

T = TypeVar("T")


def in_parallel(f: Oracle, m: int, rule: Rule) -> Update | None:
    """The update of ``Micro(m, rule)`` in two passes over the whole batch; ``None`` where the model does not factor.

    Raises:
        ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
    """
    uses_g = rule.uses_g or f.keep_g
    before = RandomState.now(f.parameters.devices)
    parts, rho = Parts(len(f.batch()), m), f.rho.values
    reweighted = hasattr(rule.sample, "weights")  # by norms that the whole pass gives
    early = None if reweighted else lambda look: Harvest(look, parts, TWO_PASSES, rho)
    factors = factors_of(f, uses_g, early=early)
    if factors is None:
        return None
    try:
        if reweighted:
            _reweight(factors, parts, rule)
        see = _perturbed(f, factors, parts, rule)
        if uses_g:
            f.keep(factors.g)
        with f.away():
            g_adv = f.grad(under=black_boxes(f.batch().model, see))
    except Exception as error:  # the serial loop will raise it again, if it is the model's own
        fall_back(f, factors.entry, error, before)
        return None
    factors.entry.succeed()
    f.compare(g_adv)
    return rule.combine(f, g_adv)


def cheaper_in_parallel(f: Oracle) -> bool:
    """Whether plain SAM's own two passes cost less with factors, by counted multiplications; asked of whole batches."""
    if f.parallel != "auto" or not f.is_whole or not f.ranks.alone or not isinstance(f.closure, Batch):
        return False
    if isinstance(f.closure, Batches):  # one batch is held at a time
        return False
    plan = plan_for(f, f.closure)
    return not plan.reason and plan.cost < 0.95


def _reweight(factors: Factors, parts: Parts, rule: Rule) -> None:
    """Every micro-batch's gradient becomes ``sum_i p_i grad f_i``, with weights over its own examples."""
    norms = factors.norms(Parts(factors.n, 1))
    p = [rule.sample.weights(norms[a:b].reshape(-1, m)) * m for a, b, m in parts.spans]  # type: ignore[attr-defined]
    factors.scale(torch.cat([chunk.flatten() for chunk in p]))


def _perturbed(f: Oracle, factors: Factors, parts: Parts, rule: Rule) -> See:
    """The second pass: ``eps_k = rho radial(norm(G_k)) G_k`` of every micro-batch."""
    rho = f.rho.values
    matrices, small = factors.gathered or factors.of(parts, rho=rho)
    with torch.no_grad():
        squares = {
            radius: squared_norms(_with(radius, matrices, rho), _with(radius, small, rho))
            for radius in sorted({rho[i] for i in (*matrices, *small)})
        }
        total = _sum(squares.values()).clamp_min(0)
        per_mean = factors.to_own_mean(parts, total)
        norms = per_mean * total.sqrt()
        factor = rule.geometry.radial(norms) * per_mean  # type: ignore[attr-defined]
        scale = {radius: radius * factor for radius in squares}
        eps = {i: scale[rho[i]].reshape(-1, *[1] * (t.dim() - 1)) * t for i, t in small.items()}
        eps_squares = _sum(scale[radius].square() * square for radius, square in squares.items())
        f.note_parts(norms, eps_squares.clamp_min(0).sqrt(), parts.sizes(total) / factors.n)
    for site in factors.look.sites:
        site.let_go()
    big = {i: (gradient, scale[rho[i]]) for i, gradient in matrices.items()}
    return See(factors.look.tracked, OPERATIONS, factors.look.sites, parts, big, eps)


def _with(radius: float, found: Mapping[int, T], rho: Sequence[float]) -> list[T]:
    return [value for i, value in found.items() if rho[i] == radius]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(add, tensors)
