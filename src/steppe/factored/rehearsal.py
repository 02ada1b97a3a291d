"""The passes of a rehearsal: where examples lie, then the update of m-SAM made both ways, shared and serial."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from operator import add

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Loss
from steppe.engine.grads import drop
from steppe.engine.nested import Data
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import Passes
from steppe.engine.replay import frozen_statistics, generator
from steppe.engine.vector import Vector, wide
from steppe.factored.black_box import black_boxes
from steppe.factored.collect import relative_cost, weighted_sum
from steppe.factored.draws import Draws
from steppe.factored.layers import LAYERS
from steppe.factored.maps import Lookup
from steppe.factored.microbatches import MicroBatches, Place, places
from steppe.factored.passes import FirstPass
from steppe.factored.rounding import Found, InFloat32, Rounding, differences
from steppe.factored.shared import SharingPlan, by_part, record, second_pass
from steppe.factored.sites import Site
from steppe.factored.tracked import CannotFactor, Differs, Tracked, Unsure
from steppe.factored.unseen import Kernels
from steppe.pieces.geometry import Euclidean
from steppe.pieces.protocol import Declaration
from steppe.rule import Rule

TRIED = 4  # micro-batches of each order that are made both ways
VISIBLE = 1e-3  # the least radius of a rehearsal, in norms of the weights: what is perturbed less shows no mistake


@dataclass
class _Heard:
    """A loss times a number, which keeps what it returns, and draws for a part what is drawn for it in the batch."""

    loss: Loss
    scale: float
    draws: Draws
    part: slice | None = None  # the examples of the part
    losses: list[Tensor] = field(default_factory=list)
    exact: InFloat32 | None = None

    def __call__(self, model: nn.Module, data: Data) -> Tensor:
        self.draws.begin(self.part)
        with self.exact or nullcontext():
            made = self.loss(model, data) * self.scale
        self.losses.append(made.detach())
        return made


class Rehearsal:
    """The passes of a rehearsal; none of them counts as one of the step's.

    The losses are scaled here as under the batch's scaler, which is not told. With ``exact`` the model runs in float32.
    """

    def __init__(self, f: Oracle, batch: Batch, m: int | None, draws: Draws, exact: InFloat32 | None = None) -> None:
        self.n, self.m, self.seed, self.exact = len(batch), m or 1, f.step, exact
        self.parts = None if m is None else MicroBatches(self.n, m)
        self.tensors, self.model = f.passes.parameters.tensors, batch.model
        self.tensors = [exact.copy(p) for p in self.tensors] if exact else self.tensors
        self.heard = _Heard(batch.loss, float(batch.loss_scale(self.tensors[0].detach())), draws, exact=exact)
        self.batch = copy(batch)
        self.batch.loss, self.batch.scaler = self.heard, None
        self.ranks = replace(f.passes.ranks, begun=True)
        self.ranks.stay_within()
        size = float(Vector([p.detach() for p in self.tensors]).norm())
        larger = max(1.0, VISIBLE * size / f.rho.largest())
        self.parameters = Parameters(self.tensors, Radii([larger * rho for rho in f.rho.values]))

    def plan(self, tracked: Tracked) -> SharingPlan:
        """Find where examples lie, and how far rounding goes."""
        first, g, plan = self.recorded(tracked.of_tensors(self.tensors))
        seen = [*(d for site in first.sites for d in site.deltas), *self.heard.losses[-1:]]
        rounding = Rounding.of(seen, exact=self.exact is not None)
        self.rounding = rounding.of_model(self.first_part, self.tensors, self.heard.scale)
        plan.apply(first)
        whole = torch.ones(self.n, device=first.sites[0].deltas[0].device)
        self.check_close(weighted_sum(first, whole, self.tensors), g, first.tracked, self.rounding.gradients)
        return replace(plan, cost=relative_cost(first))

    def prove(self, plan: SharingPlan, permuted: bool) -> None:
        """Make the update both ways, on the batch or on a permutation of its examples."""
        random = generator(self.seed, self.n)
        batch = self.batch.subset(torch.randperm(self.n, generator=random)) if permuted else self.batch
        self.check_both_ways(batch, plan, self.chosen(random), self.rounding)

    def first_part(self) -> Found:
        """Return the losses of the first micro-batch by itself, at ``w`` and ``w + eps``, and its update."""
        self.heard.losses.clear()
        trial = Oracle(self.batch, self.parameters, declares=Declaration(g=False), ranks=self.ranks)
        with frozen_statistics(self.batch.modules()):
            update = self.serial(trial, self.batch.split(self.m)[0], 0)
        return torch.cat(self.heard.losses), update.materialised()

    # ---- where examples lie

    def recorded(self, tracked: Tracked) -> tuple[FirstPass, list[Tensor | None], SharingPlan]:
        """Return a first pass, the gradient of its mean, and the plan that follows from it, if that is right."""
        for _ in range(3):
            first = FirstPass(tracked, LAYERS, self.parts)
            g, weights = self.two_backwards(first)
            if not first.sites:
                raise CannotFactor("no perturbed parameter takes part in the loss")
            found = [_place(site, weights, first) for site in first.sites]
            sites = [site for site, place in zip(first.sites, found, strict=True) if place is None]
            misfits = {site.lookup for site in sites if isinstance(site.map, Lookup)}
            if not misfits - tracked.unbatched:
                break
            tracked = replace(tracked, unbatched=tracked.unbatched | misfits)  # repeat positions for every example
        known = []
        for site, place in zip(first.sites, found, strict=True):
            del site.deltas[1:]
            if place is None:
                raise Differs(f"examples influence one another at {first.label(site)}")
            known.append(place)
        first.check()
        return first, g, SharingPlan(tracked, first.structure(), tuple(known), mixes=first.mixes, calls=first.calls)

    def two_backwards(self, first: FirstPass) -> tuple[list[Tensor | None], Tensor]:
        """Run one forward, and the backward of the mean and of a sum whose random weights tell examples apart.

        Returns:
            The gradient of the mean, at a loss scale that keeps it well within float16, and the weights.
        """
        parameters = [(first.tracked.names[i], p) for i, p in first.tracked.tensors.items()]
        passes = Passes(self.batch, self.parameters)
        with passes.one(away=True):
            kernels = Kernels(first, parameters)
            with kernels, black_boxes(self.model, first):
                losses = self.batch.losses()
            kernels.check()
            if not losses.isfinite().all():
                raise Unsure("the losses of this batch are not finite")
            order = torch.randperm(first.independent, generator=generator(self.seed, 0))
            weights = 2.0 ** (order % 5 - 4)  # powers of two commute with rounding, TF32's too
            weights = (self.parts.spread(weights) if self.parts is not None and first.mixes else weights).to(losses)
            g, smaller = self.first_backward(losses, first)
            (losses @ weights * (smaller / self.n)).backward()
        self.heard.scale *= smaller
        return g, weights

    def first_backward(self, losses: Tensor, first: FirstPass) -> tuple[list[Tensor | None], float]:
        """Return the gradient of the mean, and what the losses have to be multiplied by for it to fit in float16."""
        smaller = 1.0
        while True:
            (losses.mean() * smaller).backward(retain_graph=True)
            g = [None if p.grad is None else p.grad.detach().clone() for p in self.tensors]
            fits = all(float(t.abs().max()) < 1e3 for t in g if t is not None and t.numel())
            if fits or self.heard.scale * smaller <= 1:
                return g, smaller
            smaller = max(1 / self.heard.scale, smaller / 64)
            drop(self.tensors)
            for site in first.sites:
                site.deltas.clear()

    # ---- both ways

    def chosen(self, random: torch.Generator) -> list[int]:
        """Return the micro-batches to make both ways: the first, the last, and random ones."""
        k = MicroBatches(self.n, self.m).k
        others = (torch.randperm(k, generator=random) + k - 1) % k  # any order
        return list(dict.fromkeys([0, k - 1, *others.tolist()]))[:TRIED]

    def check_both_ways(self, batch: Batch, plan: SharingPlan, chosen: Sequence[int], rounding: Rounding) -> None:
        """Raise unless shared passes and the serial loop give the same losses and the same update."""
        self.heard.losses.clear()
        trial = Oracle(batch, self.parameters, declares=Declaration(g=False), ranks=self.ranks)
        rows = torch.cat([torch.arange(k * self.m, min(self.n, (k + 1) * self.m)) for k in chosen])
        before = self.buffers()
        with frozen_statistics(batch.modules()):
            ours = self.shared(trial, plan, rows)
            after = self.buffers()
        together = self.heard.losses.copy()
        self.heard.losses.clear()
        trial.passes.counted, parts = False, batch.split(self.m)
        with frozen_statistics(batch.modules()):  # which micro-batches change one after another
            theirs = reduce(add, [self.serial(trial, parts[k], k) for k in chosen])
        alone = [torch.cat(self.heard.losses[i::2]) for i in range(len(together))]
        for whole, single in zip(together, alone, strict=True):
            self.check_losses(whole[rows.to(whole.device)], single, alone[0], rounding)
        if not all(map(torch.equal, before, after)):
            self.check_buffers(parts, after, rounding.losses)
        self.check_close(ours.materialised(), theirs.materialised(), plan.tracked, rounding.gradients)

    def buffers(self) -> list[Tensor]:
        """Return copies of the model's buffers."""
        return [b.clone() for m in self.batch.modules() for b in m._buffers.values() if b is not None]

    def check_buffers(self, parts: Sequence[Batch], ours: Sequence[Tensor], bound: float) -> None:
        """Raise unless the forwards of all micro-batches leave the same buffers, such as running statistics."""
        with frozen_statistics(self.batch.modules()), torch.no_grad():
            for k, part in enumerate(parts):
                with self.drawing(part, k):
                    part.losses()
            theirs = self.buffers()
        for a, b in zip(ours, theirs, strict=True):
            error = 1.0 if a.shape != b.shape else _distance(a, b)
            exact = not b.is_floating_point()  # such as a counter
            _judge(f"a buffer differs by {error:.0e} from what the serial loop leaves", error, 0.0 if exact else bound)

    def shared(self, trial: Oracle, plan: SharingPlan, rows: Tensor) -> Vector:
        """Return the sum over some micro-batches of ``size / n`` times the gradient at ``w + eps_k``."""
        parts = MicroBatches(self.n, self.m)
        recorded = record(trial, plan, self.parts, by_part(parts, trial))
        second = second_pass(trial, recorded, parts, Euclidean().radial)
        weights = torch.zeros(self.n, dtype=torch.float64).index_fill(0, rows, 1 / self.n)
        with trial.passes.away_from_w():
            made = trial.passes.gradient(weights=weights, under=black_boxes(self.model, second))
        plan.calls.update(recorded.first.calls | second.calls)
        return made

    def serial(self, trial: Oracle, part: Batch, k: int) -> Vector:
        """Return the same of micro-batch ``k`` by itself."""
        with self.drawing(part, k):
            return len(part) / self.n * Rule()(trial.part(part)).grad

    @contextmanager
    def drawing(self, part: Batch, k: int) -> Iterator[None]:
        """Let micro-batch ``k`` draw the random numbers that it has in the batch."""
        self.heard.part = slice(k * self.m, k * self.m + len(part))
        try:
            yield
        finally:
            self.heard.part = None

    def check_losses(self, ours: Tensor, theirs: Tensor, at_w: Tensor, rounding: Rounding) -> None:
        """Raise unless losses are the same; where they have risen by ``eps``, so far as that is."""
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            raise Unsure("the losses of this batch are not finite")
        size = float(theirs.abs().mean()) + self.heard.scale
        error, rise = (float((t - theirs).abs().max()) / size for t in (ours, at_w))
        bound = rounding.losses + rise * rounding.gradients
        reason = "the loss of an example depends on the other examples of its batch, or on chance"
        _judge(f"{reason}: it differs by {error:.0e}", error, bound)

    def check_close(
        self, ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tracked: Tracked, bound: float
    ) -> None:
        """Raise unless gradients are the same."""
        for i, error in enumerate(differences(ours, theirs)):
            name = tracked.names.get(i)
            if name is not None and (ours[i] is None) != (theirs[i] is None):
                raise CannotFactor(f"{name} takes part in a way that was not recorded")
            if error is None:
                continue
            if not error < float("inf"):
                raise Unsure("a gradient of this batch is not finite")
            name = name or f"parameter {i}"
            _judge(f"shared passes and the serial loop differ by {error:.0e} in the gradient of {name}", error, bound)


def _judge(reason: str, error: float, bound: float) -> None:
    if not error <= bound:  # or it is no number
        raise Differs(reason, final=not error <= 30 * bound)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two buffers, relative to ``b``'s largest number; infinities may be equal."""
    a, b = (t.to(torch.float64 if t.is_floating_point() else torch.int64).flatten() for t in (a, b))
    other = (a != b) & ~(a.isnan() & b.isnan())
    if not other.any():
        return 0.0
    return float((a[other] - b[other]).abs().max() / (b[b.isfinite()].abs().max() + 1 if b.isfinite().any() else 1))


def _place(site: Site, weights: Tensor, first: FirstPass) -> Place | None:
    """Return where examples lie, if the second backward is the first times their weights.

    Raises:
        Unsure: there is no gradient to tell, or it fits two places.
    """
    if len(site.deltas) != 2:
        raise CannotFactor(f"{first.label(site)} has no gradient in this pass, or several")
    a, b = (wide(d.reshape(prod(site.leading), -1)) for d in site.deltas)
    if site.parts is not None and not a.any() and not b.any():
        return Place(0)  # of copies it is known
    if not a.norm() > 0 or not a.isfinite().all():
        raise Unsure(f"the gradient at {first.label(site)} is zero or not finite for this batch")
    low = any(wide(d) is not d for d in site.deltas)
    weights = weights if site.parts is None else weights[site.parts.starts]
    found = []
    for layout, place in places(len(weights), site.leading).items():
        w = wide(weights)[layout.example_of_row(len(a), a.device), None]
        if (b - w * a).norm() < (0.3 if low else 1e-2) * b.norm():
            found.append(place)
    if len(found) > 1 and first.independent > 1:
        raise Unsure(f"examples may lie in two ways at {first.label(site)}, and this batch fits both")
    return found[0] if found else None
