"""The first pass, recorded: gradients of every example or micro-batch, as factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from steppe.batch import Batches
from steppe.engine.oracle import Oracle
from steppe.engine.passes import RandomState
from steppe.engine.vector import Vector
from steppe.factored.black_box import black_boxes
from steppe.factored.cost import HELD, NORMS, TWO_PASSES, WEIGHTED, Cost
from steppe.factored.gradients import Gradients, Harvest, gradients
from steppe.factored.held import Held
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import Entry, entry_of, fall_back, may_share
from steppe.factored.rehearsal import Plan
from steppe.factored.tape import Look, Site
from steppe.factored.terms import Factored, squared_norms, uncast

T = TypeVar("T")


@dataclass
class Factors:
    """One batch's first pass at ``w``; gradients are those of the mean loss over an example or a micro-batch."""

    look: Look
    n: int
    parameters: Sequence[Tensor]
    g: Vector  # of the mean loss; no entries where it was not asked for
    entry: Entry
    loss_scale: Tensor | float = 1.0  # of the losses of this pass, and so of what it has recorded
    gathered: Gradients | None = None  # what a harvest has made during the pass; then nothing else can be

    def of(self, parts: Parts, cost: Cost = TWO_PASSES, rho: Sequence[float] | None = None) -> Gradients:
        """Matrices and other parameters of every part, as contributions to the batch's mean, times the loss scale."""
        with torch.no_grad():
            return gradients(self.look, parts, cost, rho)

    def norms(self, parts: Parts) -> Tensor:
        """``norm(G_k)`` of every part over all perturbed parameters together, shape ``(k,)``."""
        return self._norms(parts, self.of(parts, NORMS))

    def by_example(self) -> Tensor:
        """``norm(grad f_i)``, shape ``(n,)``, of gathered examples; :meth:`weighted` may follow."""
        assert self.gathered is not None
        return self._norms(Parts(self.n, 1), self.gathered)

    def _norms(self, parts: Parts, gradients: Gradients) -> Tensor:
        matrices, small = gradients
        with torch.no_grad():
            squares = squared_norms(matrices.values(), small.values())
            return self.to_own_mean(parts, squares) * squares.clamp_min(0).sqrt()

    def to_own_mean(self, parts: Parts, like: Tensor) -> Tensor:
        """What makes each part's contribution the gradient of its own mean loss, shape ``(k,)``."""
        return self.n / self.loss_scale / parts.sizes(like)

    def weighted(self, p: Tensor) -> Vector:
        """``sum_i p_i grad f_i`` on the perturbed parameters, after :meth:`by_example`: no backward, no other pass."""
        assert self.gathered is not None
        (matrices, small), self.gathered = self.gathered, None
        made: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad():
            c = self.n * p
            for i, gradient in matrices.items():
                made[i] = gradient.weighted(c).reshape(self.parameters[i].shape)
                if isinstance(gradient, Factored) and gradient.bias is not None:
                    made[gradient.bias] = gradient.weighted_bias(c)
            for i, t in small.items():
                made[i] = (c.to(t.dtype) @ t.flatten(1)).reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def mean(self) -> Vector:
        """The gradient of the mean loss on the perturbed parameters: one weight-gradient pass, no backward."""
        matrices, small = self.of(Parts(self.n, self.n), HELD)
        made: list[Tensor | None] = [None] * len(self.parameters)
        for i, gradient in matrices.items():
            assert isinstance(gradient, Held)
            made[i] = gradient.chunks[0][0].reshape(self.parameters[i].shape).clone()  # its memory serves the next
        for i, t in small.items():
            made[i] = t[0].reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def scale(self, c: Tensor) -> None:
        """Multiply every example's loss by ``c_i``: its gradients follow."""
        for site in self.look.sites:
            delta = site.deltas[0]
            rows = delta.shape[: len(site.leading)].numel()
            assert site.layout is not None
            c_rows = c[site.layout.example_of_row(rows, c.device)].to(delta.dtype)
            site.deltas[0] = delta * c_rows.reshape(*site.leading, *[1] * (delta.dim() - len(site.leading)))


def factors_of(
    f: Oracle, uses_g: bool = False, entry: Entry | None = None, early: Callable[[Look], Harvest] | None = None
) -> Factors | None:
    """Run the first pass and record it; ``None`` where the model does not factor.

    Args:
        f: the oracle, of one batch.
        uses_g: whether ``g`` is wanted too.
        entry: what is known of its model, where that has been asked for already.
        early: gathers gradients during the backward pass; what they are made of is let go of as it comes.

    Raises:
        ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
    """
    if not f.parallel:
        return None
    batch = f.batch("its examples' gradients")
    entry = entry or entry_of(f, batch)
    if not may_share(f, entry.plan):
        return None
    before = RandomState.now(f.parameters.devices)
    look = Look(entry.plan.tracked, OPERATIONS, entry.plan.pool)
    harvest = early(look) if early else None
    look.gather = None if harvest is None else _gathering(harvest, entry.plan)
    try:
        wrt = None if uses_g else [False] * len(f.parameters.tensors)
        g = f.grad(wrt=wrt, under=black_boxes(batch.model, look))
        look.check()
        entry.plan.apply(look)
        scale = batch.loss_scale(f.parameters.tensors[0].detach())
        gathered = None if harvest is None else harvest.gradients()
        return Factors(look, len(batch), f.parameters.tensors, g, entry, scale, gathered)
    except Exception as error:  # the serial loop will raise it again, if it is the model's own
        fall_back(f, entry, error, before)
    finally:
        look.gather = None  # else what is gathered would hang in a circle
    return None


def _gathering(harvest: Harvest, plan: Plan) -> Callable[[Site], None]:
    def gather(site: Site) -> None:
        if site.layout is None:  # the first one
            plan.apply(harvest.look)
        with uncast(site.deltas[0]):
            harvest.take(site)
        site.let_go()

    return gather


def _by_example(look: Look) -> Harvest:
    return Harvest(look, Parts(look.tracked.n, 1), WEIGHTED)


def example_norms(f: Oracle) -> Tensor | None:
    """``norm(grad f_i)`` of every example, shape ``(n,)``; ``None`` where the model does not factor.

    ``f.factors`` keeps the factors, for the weighted gradient. Those of accumulated batches are held one batch at a
    time, in passes that count for nothing else, so that the weighted gradient is an ordinary pass over them again.
    """
    if not f.parallel:
        return None
    with f.ranks.within():
        if isinstance(f.closure, Batches):
            norms = _norms_by_chunk(f, f.closure)
        else:
            f.factors = factors_of(f, early=_by_example)
            norms = None if f.factors is None else _from_factors(f, f.factors.by_example)
    return _agreed(f, norms)


def weighted_gradient(f: Oracle, p: Tensor) -> Vector | None:
    """``sum_i p_i grad f_i`` from the factors of :func:`example_norms`; ``None`` where there are none."""
    if f.factors is None:
        return None
    factors: Factors = f.factors
    d = _agreed(f, _from_factors(f, lambda: factors.weighted(p)))
    if d is not None:
        factors.entry.succeed()
    return d


def _agreed(f: Oracle, found: T | None) -> T | None:
    """What was found, if it was on all ranks that share gradients."""
    found = f.ranks.agreed(found, f.parameters.tensors[0].device)
    if found is None:
        f.factors = None
    return found


def _norms_by_chunk(f: Oracle, batches: Batches) -> Tensor | None:
    entries = [entry_of(f, chunk) for chunk in batches.chunks]
    if not all(may_share(f, entry.plan) for entry in entries):
        return None
    found: list[Tensor] = []
    with f.trial():
        for (_, part), entry in zip(f.chunks(), entries, strict=True):
            part.factors = factors_of(part, entry=entry, early=_by_example)
            norms = None if part.factors is None else _from_factors(part, part.factors.by_example)
            if norms is None:
                break
            part.factors = None
            entry.succeed()
            found.append(norms)
    return torch.cat(found) if len(found) == len(entries) else None


def _from_factors(f: Oracle, make: Callable[[], T]) -> T | None:
    """What follows from ``f.factors``; ``None``, and no factors any more, where it raises."""
    before, entry = RandomState.now(f.parameters.devices), f.factors.entry
    try:
        return make()
    except Exception as error:
        f.factors = None
        fall_back(f, entry, error, before)
    return None
