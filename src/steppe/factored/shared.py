"""The two shared passes over a batch, as a plan allows them: what the first records, and the second that follows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
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
from steppe.factored.microbatches import MicroBatches, Place, merged
from steppe.factored.normalisation import update_running_statistics
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import Interception, Site, Tracked, Unsure

PATHS = 8  # kept of a model; the least recently used go first


class NotProven(Unsure):
    """A forward pass does other things than those that were proven."""

    def __init__(self) -> None:
        super().__init__("the forward pass does other things than those that were verified")


@dataclass
class Proven:
    """What rehearsals have proven of a model: the paths of its forward pass, whatever the sizes of its data.

    A model that draws a number for the whole batch may skip layers by it (LayerDrop, stochastic depth), and has more
    paths than can be rehearsed. There each use of a parameter has to be proven, in any combination with others.

    Attributes:
        paths: the uses of parameters in a pass -> where examples lie; ``None`` where rehearsals found two places.
        uses: the same for each use by itself.
        calls: the calls of torch functions, by function and place in the code.
        draws: whether the model draws a number for the whole batch.
    """

    paths: OrderedDict[Any, Sequence[Place | None]] = field(default_factory=OrderedDict)
    uses: dict[Any, Place | None] = field(default_factory=dict)
    calls: set[Any] = field(default_factory=set)
    draws: bool = False

    def places(self, first: FirstPass) -> Sequence[Place | None]:
        """Return where examples lie at every use in a pass; ``None`` where that is not proven."""
        path = first.path()
        if path in self.paths:
            self.paths.move_to_end(path)
            return self.paths[path]
        return [self.uses.get(use) if self.draws else None for use in path]

    def add(self, path: Sequence[Any], places: Sequence[Place | None]) -> None:
        """Add where examples lie in a rehearsed pass."""
        self.paths[path] = list(map(merged, self.paths.get(path, places), places))
        self.uses |= {use: merged(self.uses.get(use, place), place) for use, place in zip(path, places, strict=True)}
        if len(self.paths) > PATHS:
            self.paths.popitem(last=False)

    def update(self, other: Proven) -> None:
        """Add what another rehearsal has proven."""
        for path, places in other.paths.items():
            self.add(path, places)
        self.calls |= other.calls
        self.draws |= other.draws


@dataclass(frozen=True)
class SharingPlan:
    """Where examples lie at every site of a model, whatever the sizes of its data; or why passes are not shared.

    Attributes:
        tracked: the perturbed parameters.
        reason: why micro-batches cannot share passes; empty where they can.
        final: whether the reason holds for every batch.
        cost: the cost of plain SAM in shared passes, relative to that of its two ordinary passes.
        proven: what the forward pass may do.
    """

    tracked: Tracked
    reason: str = ""
    final: bool = True
    cost: float = 1.0
    proven: Proven = field(default_factory=Proven, compare=False, repr=False)

    def apply(self, first: FirstPass) -> None:
        """Give the sites of a pass their layouts.

        Raises:
            NotProven: the pass does other things than the one that was proven.
        """
        for site, place in zip(first.sites, self.proven.places(first), strict=True):
            n = first.tracked.n if site.parts is None else site.parts.k
            site.layout = place.layout(n, site.leading) if place else None
            if site.layout is None:
                raise NotProven

    def covers(self, passing: Interception) -> None:
        """Raise where a pass made calls that no rehearsal has made; a rehearsal on this batch makes them."""
        if passing.calls:
            raise NotProven


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
    first = FirstPass(replace(plan.tracked, n=len(batch)), LAYERS, within, plan.proven.calls)
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
    return SecondPass(recorded.first, parts, big, eps)


def _log(f: Oracle, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
    """Log the mean over micro-batches of the norms, shape ``(k,)``."""
    if f.passes.scale is not None:
        f.passes.scale.watch(g_norms)
    f.passes.log.norms.append(g_norms.sum())
    f.passes.log.numbers["g_norm"] = g_norms @ shares
    f.passes.log.numbers["eps_norm"] = eps_norms @ shares
