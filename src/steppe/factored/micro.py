"""m-SAM in two passes over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.batch import Batch
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import Plan, forget, gradients, plan_for
from steppe.factored.tape import CannotFactor, Look, See
from steppe.factored.terms import Gradient
from steppe.oracle import Oracle
from steppe.update import Update
from steppe.vector import wide

if TYPE_CHECKING:
    from steppe.rule import Rule


def in_parallel(f: Oracle, m: int, rule: Rule) -> Update | None:
    """The update of ``Micro(m, rule)`` in two passes over the whole batch; ``None`` where the model does not factor.

    Raises:
        ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
    """
    batch = f.batch("micro-batches, m=")
    plan = plan_for(f, batch)
    if plan.reason and not (plan.mixes and f.parallel is True):
        return _refused(f, plan.reason)
    try:
        return _two_passes(f, batch, plan, Parts(len(batch), m), rule)
    except CannotFactor as error:
        forget(f, batch, str(error))
        return _refused(f, str(error))


def _refused(f: Oracle, reason: str) -> None:
    if f.parallel is True:
        raise ValueError(f"parallel must be 'auto' or False for this model: {reason}")


def _two_passes(f: Oracle, batch: Batch, plan: Plan, parts: Parts, rule: Rule) -> Update:
    look = Look(plan.tracked, OPERATIONS)
    uses_g = getattr(rule.combine, "uses_g", True)
    g = f.grad(wrt=None if uses_g else [False] * len(f.point.parameters), under=look)
    plan.apply(look)
    with torch.no_grad():
        matrices, small = gradients(look, parts)
        per_mean = len(batch) / parts.sizes(_norms_like(matrices, small))
        norms = per_mean * _norms(matrices, small, parts)
        factor = rule.geometry.radial(norms) * per_mean  # type: ignore[attr-defined]
        eps = {i: f.rho.values[i] * factor for i in plan.tracked.names}
        see = See(
            plan.tracked,
            OPERATIONS,
            look.sites,
            parts,
            {i: (gradient, eps[i]) for i, gradient in matrices.items()},
            {i: (eps[i].reshape(-1, *[1] * (t.dim() - 1)) * t) for i, t in small.items()},
        )
    f.note_parts(norms, factor / per_mean * norms, parts.sizes(norms) / len(batch))
    if uses_g:
        f.keep(g)
    with f.away():
        g_adv = f.grad(under=see)
    f.compare(g_adv)
    return rule.combine(f, g_adv)


def _norms_like(matrices: Mapping[int, Gradient], small: Mapping[int, Tensor]) -> Tensor:
    t = next(iter(small.values())) if small else next(iter(matrices.values())).terms[0].right
    return wide(t)


def _norms(matrices: Mapping[int, Gradient], small: Mapping[int, Tensor], parts: Parts) -> Tensor:
    """``norm(G_k)`` over all perturbed parameters together, shape ``(k,)``."""
    squares = [gradient.squares() for gradient in matrices.values()]
    squares += [wide(t).flatten(1).square().sum(1) for t in small.values()]
    return torch.stack(torch.broadcast_tensors(*squares)).sum(0).clamp_min(0).sqrt()
