"""The two shared passes over a batch, as a plan allows them: what the first records, and the second that follows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from steppe.engine.oracle import Oracle
from steppe.factored.collect import Collector, Cost, Recorded
from steppe.factored.composites import registered_modules
from steppe.factored.gradients import squared_norms, uncast
from steppe.factored.layers import LAYERS
from steppe.factored.microbatches import MicroBatches, Place
from steppe.factored.normalisation import update_running_statistics
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import Interception, Site, Tracked, Unsure


class NotProven(Unsure):
    """A forward pass does other things than those that were proven."""

    def __init__(self, structure: tuple[Any, ...]) -> None:
        super().__init__("the forward pass does other things than those that were verified")
        self.structure = structure


@dataclass(frozen=True)
class SharingPlan:
    """Where examples lie at every site of a model, whatever the sizes of its data; or why passes are not shared.

    Attributes:
        tracked: the perturbed parameters.
        structure: what the forward pass does with them (:meth:`FirstPass.structure`).
        places: where examples lie, for every site.
        reason: why micro-batches cannot share passes; empty where they can.
        final: whether the reason holds for every batch.
        cost: the cost of plain SAM in shared passes, relative to that of its two ordinary passes.
        calls: the calls of torch functions that its rehearsals have made, by function and place in the code. A pass
            that makes another one runs a part of the model or the loss that has not been proven.
    """

    tracked: Tracked
    structure: tuple[Any, ...] = ()
    places: tuple[Place, ...] = ()
    reason: str = ""
    final: bool = True
    cost: float = 1.0
    calls: set[Any] = field(default_factory=set, compare=False, repr=False)

    def apply(self, first: FirstPass) -> None:
        """Give the sites of a pass their layouts.

        Raises:
            NotProven: the pass does other things than the one that was proven.
        """
        structure = first.structure()
        if structure != self.structure:
            raise NotProven(structure)
        for site, place in zip(first.sites, self.places, strict=True):
            n = first.tracked.n if site.parts is None else site.parts.k
            site.layout = place.layout(n, site.leading)
            if site.layout is None:
                raise NotProven(structure)

    def covers(self, passing: Interception) -> None:
        """Raise where a pass made calls that no rehearsal has made; a rehearsal on this batch makes them."""
        if passing.calls:
            raise NotProven(self.structure)


@contextmanager
def running(model: nn.Module, passing: Interception) -> Iterator[None]:
    """Surround the forward of a pass; running statistics are updated at its end."""
    passing.running = True
    try:
        with registered_modules(model, passing), passing:
            yield
        if isinstance(passing, SecondPass):
            passing.check()
        else:
            update_running_statistics(model, passing)
    finally:
        passing.running = False


def record(
    f: Oracle,
    plan: SharingPlan,
    within: MicroBatches | None = None,
    collected: tuple[MicroBatches, Cost] | None = None,
    needs_g: bool = False,
) -> Recorded:
    """Run the first pass and return what it has recorded.

    Args:
        f: the oracle, of one batch.
        plan: a proven plan.
        within: the micro-batches within which examples may influence one another; ``None`` where none may.
        collected: the micro-batches whose gradients are made, and their factors freed, during the backward pass.
        needs_g: whether to compute the gradient of the mean, too.
    """
    batch, parameters = f.batch("its examples' gradients"), f.passes.parameters
    first = FirstPass(replace(plan.tracked, n=len(batch)), LAYERS, within)
    first.proven = plan.calls
    collector = Collector(first, *collected, f.rho.values) if collected else None
    first.on_delta = None if collector is None else _collecting(collector, plan)
    try:
        wrt = None if needs_g else [False] * len(parameters.tensors)
        g = f.passes.gradient(wrt=wrt, under=running(batch.model, first))
        first.check()
        plan.apply(first)
        scale = batch.loss_scale(parameters.tensors[0].detach())
        gradients = None if collector is None else collector.gradients()
        return Recorded(first, len(batch), parameters.tensors, g, scale, gradients)
    finally:
        first.on_delta = None  # breaks the reference cycle that would keep the gradients


def _collecting(collector: Collector, plan: SharingPlan) -> Callable[[Site], None]:
    def collect(site: Site) -> None:
        if site.layout is None:  # the first one
            plan.apply(collector.first)
        with uncast(site.deltas[0]):
            collector.take(site)
        site.free()

    return collect


def second_pass(f: Oracle, recorded: Recorded, parts: MicroBatches, radial: Callable[[Tensor], Tensor]) -> SecondPass:
    """Return the second pass, with ``eps_k = rho radial(norm(G_k)) G_k`` for every micro-batch."""
    rho = f.rho.values
    matrices, small = recorded.collected or recorded.of(parts, rho=rho)
    with torch.no_grad():
        squares = {}  # norm(G_k)^2 over the parameters of each radius
        for radius in sorted({rho[i] for i in (*matrices, *small)}):
            gradients = [g for i, g in matrices.items() if rho[i] == radius]
            squares[radius] = squared_norms(gradients, [t for i, t in small.items() if rho[i] == radius])
        total = reduce(add, squares.values()).clamp_min(0)
        per_mean = recorded.to_own_mean(parts, total)
        norms = per_mean * total.sqrt()
        factor = radial(norms) * per_mean
        scale = {radius: radius * factor for radius in squares}
        eps = {i: scale[rho[i]].reshape(-1, *[1] * (t.dim() - 1)) * t for i, t in small.items()}
        eps_squares = reduce(add, (scale[radius].square() * square for radius, square in squares.items()))
        _log(f, norms, eps_squares.clamp_min(0).sqrt(), parts.sizes(total) / recorded.n)
    for site in recorded.first.sites:
        site.free()
    big = {i: (gradient, scale[rho[i]]) for i, gradient in matrices.items()}
    second = SecondPass(recorded.first.tracked, LAYERS, recorded.first.sites, parts, big, eps)
    second.proven = recorded.first.proven
    return second


def _log(f: Oracle, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
    """Log the mean over micro-batches of the norms, shape ``(k,)``."""
    if f.passes.scale is not None:
        f.passes.scale.watch(g_norms)
    f.passes.log.norms.append(g_norms.sum())
    f.passes.log.numbers["g_norm"] = g_norms @ shares
    f.passes.log.numbers["eps_norm"] = eps_norms @ shares
