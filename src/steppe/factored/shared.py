"""The two shared passes over a batch, as a plan allows them: what the first records, and the second that follows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from steppe.engine.oracle import Oracle
from steppe.factored.black_box import black_boxes
from steppe.factored.collect import TWO_PASSES, Collector, Recorded
from steppe.factored.gradients import squared_norms, uncast
from steppe.factored.layers import LAYERS
from steppe.factored.microbatches import MicroBatches, Place
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import Interception, Site
from steppe.factored.tracked import NotProven, Tracked

T = TypeVar("T")


@dataclass(frozen=True)
class SharingPlan:
    """Where examples lie at every site of a model, whatever the sizes of its data; or why passes are not shared.

    Attributes:
        tracked: the perturbed parameters.
        structure: what the forward pass does with them (:meth:`FirstPass.structure`).
        places: where examples lie, for every site.
        reason: why micro-batches cannot share passes; empty where they can.
        final: whether the reason holds for every batch.
        mixes: whether examples of a micro-batch influence one another, as in batch normalisation.
        cost: the cost of plain SAM in shared passes, relative to that of its two ordinary passes.
        calls: the calls of torch functions that its rehearsals have made, by function and place in the code. A pass
            that makes another one runs a part of the model or the loss that has not been proven.
    """

    tracked: Tracked
    structure: tuple[Any, ...] = ()
    places: tuple[Place, ...] = ()
    reason: str = ""
    final: bool = True
    mixes: bool = False
    cost: float = 1.0
    calls: set[Any] = field(default_factory=set, compare=False, repr=False)

    @property
    def single(self) -> bool:
        """Whether it is for a batch of one example."""
        return bool(self.structure and self.structure[-1])

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

    def covers(self, *passes: Interception) -> None:
        """Raise where passes made calls that no rehearsal has made.

        Raises:
            NotProven: they did; a rehearsal on this batch makes them.
        """
        if any(one.calls for one in passes):
            raise NotProven(self.structure)


def record(
    f: Oracle,
    plan: SharingPlan,
    parts: MicroBatches | None = None,
    collector: Callable[[FirstPass], Collector] | None = None,
    needs_g: bool = False,
) -> Recorded:
    """Run the first pass and return what it has recorded.

    Args:
        f: the oracle, of one batch.
        plan: a proven plan.
        parts: the micro-batches within which examples may influence one another; ``None`` where none may.
        collector: makes a collector of gradients, which works and frees factors during the backward pass.
        needs_g: whether to compute the gradient of the mean, too.
    """
    batch, parameters = f.batch("its examples' gradients"), f.passes.parameters
    first = FirstPass(plan.tracked.of_size(len(batch)), LAYERS, parts)
    first.proven = plan.calls
    collecting = collector(first) if collector else None
    first.on_delta = None if collecting is None else _collecting(collecting, plan)
    try:
        wrt = None if needs_g else [False] * len(parameters.tensors)
        g = f.passes.gradient(wrt=wrt, under=black_boxes(batch.model, first))
        first.check()
        plan.apply(first)
        scale = batch.loss_scale(parameters.tensors[0].detach())
        gradients = None if collecting is None else collecting.gradients()
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


def by_part(parts: MicroBatches, f: Oracle) -> Callable[[FirstPass], Collector]:
    """Return what makes a collector of the micro-batches' gradients."""
    return lambda first: Collector(first, parts, TWO_PASSES, f.rho.values)


def second_pass(f: Oracle, recorded: Recorded, parts: MicroBatches, radial: Callable[[Tensor], Tensor]) -> SecondPass:
    """Return the second pass, with ``eps_k = rho radial(norm(G_k)) G_k`` for every micro-batch."""
    rho = f.rho.values
    matrices, small = recorded.collected or recorded.of(parts, rho=rho)
    with torch.no_grad():
        squares = {
            radius: squared_norms(_with(radius, matrices, rho), _with(radius, small, rho))
            for radius in sorted({rho[i] for i in (*matrices, *small)})
        }
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


def _with(radius: float, found: Mapping[int, T], rho: Sequence[float]) -> list[T]:
    return [value for i, value in found.items() if rho[i] == radius]


def _log(f: Oracle, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
    """Log the mean over micro-batches of the norms, shape ``(k,)``."""
    if f.passes.scale is not None:
        f.passes.scale.watch(g_norms)
    f.passes.log.norms.append(g_norms.sum())
    f.passes.log.numbers["g_norm"] = g_norms @ shares
    f.passes.log.numbers["eps_norm"] = eps_norms @ shares
