"""The rehearsal: the update of m-SAM both ways, shared and serial, on real micro-batches; the result is a plan."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine.grads import drop
from steppe.engine.nested import mapped
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import Passes
from steppe.engine.replay import RandomState, frozen_statistics, generator
from steppe.engine.vector import LOW, Vector
from steppe.factored.collect import TWO_PASSES, relative_cost
from steppe.factored.conditions import Draws, Exact, Heard, InFloat32, InFloat64, no_cast, noise_added
from steppe.factored.held import Held, first_forward, of_loss
from steppe.factored.layers import LAYERS
from steppe.factored.maps import Lookup
from steppe.factored.microbatches import MicroBatches
from steppe.factored.passes import FirstPass
from steppe.factored.rounding import Differs, Rounding
from steppe.factored.shared import NotProven, Proven, SharingPlan, record, running, second_pass
from steppe.factored.sites import CannotFactor, Tracked, Unsure
from steppe.factored.unseen import Kernels, watch
from steppe.pieces.geometry import Euclidean
from steppe.pieces.protocol import Declaration
from steppe.rule import Rule

T = TypeVar("T")

TRIED = 4  # micro-batches of each order that are made both ways
VISIBLE = 1e-3  # the least radius of a rehearsal, in norms of the weights: what is perturbed less shows no mistake


def rehearsed(f: Oracle, batch: Batch, m: int | None) -> SharingPlan:
    """Return the plan for micro-batches of ``m``, proven on this batch, or why there is none.

    With ``m=None`` it is for the gradients of single examples, which may not influence one another at all.

    The update of SAM on micro-batches is made by shared passes and by the serial loop, on the batch as it is and on a
    random permutation of its examples. The two have to agree to :class:`~steppe.factored.rounding.Rounding` in the
    losses at ``w`` and at ``w + eps_k`` and in the update, summed over at most ``TRIED`` micro-batches of each order:
    the first, the last, which may be smaller, and random ones.

    The price is 5 forwards and 6 backwards of the batch, and 4 of each of at most ``4 TRIED`` micro-batches in all.
    In half precision the second comparison is made in float32, for a forward and two backwards more. Where float32
    cannot tell a difference from rounding, all of it is made again in float64, on a copy of the model. Weights,
    gradients, buffers and random streams are restored bit for bit, and so are the numbers, tensors and containers that
    the model and its loss hold in attributes. The passes run on a copy of the data.
    """
    tracked, held, batch = Tracked.of(f, batch), Held(batch), copy(batch)
    batch.data = mapped(lambda t: t.detach().clone().requires_grad_(t.requires_grad), batch.data)
    before = RandomState.now(f.passes.parameters.devices)
    try:
        watch()
        with f.passes.ranks.apart(), Draws(len(batch), m or 1, before) as draws, ExitStack() as noise:
            first_forward(batch, m)
            noise.enter_context(noise_added(batch.model))
            rehearsal = Rehearsal(f, batch, m, draws)
            plan = rehearsal.plan(tracked)
            rehearsal.check_held(held)
            try:
                rehearsal.prove(plan, permuted=False)
                if not (rehearsal.rounding.low and _proven_in_float32(f, batch, m, draws, plan)):
                    rehearsal.prove(plan, permuted=True)
            except Differs as error:
                if error.final or rehearsal.rounding.low or not _proven_in_float64(f, batch, m, draws, plan):
                    raise
            plan.proven.draws = draws.for_all
            return plan
    except NotProven:
        return SharingPlan(tracked, reason="the model does not do the same in every forward pass", final=False)
    except CannotFactor as error:
        return SharingPlan(tracked, reason=str(error), final=error.final)
    except Exception as error:  # the model itself fails: the loop will raise the same error
        return SharingPlan(tracked, reason=described(error), final=False)
    finally:
        before.restore()
        held.restore()


def _proven_in_float32(f: Oracle, batch: Batch, m: int | None, draws: Draws, plan: SharingPlan) -> bool:
    """Prove a model of low precision in float32; return whether it can be run so.

    Raises:
        Differs: it can, and examples influence one another.
    """
    try:
        exact = InFloat32(f.passes.parameters.tensors)
        with no_cast(exact.devices):
            rehearsal = Rehearsal(f, batch, m, draws, exact)
            rehearsal.prove(replace(rehearsal.plan(plan.tracked), proven=plan.proven), permuted=True)
    except Differs:
        raise
    except Exception:  # by an operation that has one dtype alone
        return False
    return True


def _proven_in_float64(f: Oracle, batch: Batch, m: int | None, draws: Draws, plan: SharingPlan) -> bool:
    """Return whether a copy of the model in float64 can be proven, where rounding flips no ReLU."""
    try:
        exact = InFloat64(batch)
        rehearsal = Rehearsal(f, exact.batch, m, draws, exact)
        plan = replace(rehearsal.plan(plan.tracked), proven=plan.proven)  # whose path it has to take
        rehearsal.prove(plan, permuted=False)
        rehearsal.prove(plan, permuted=True)
    except Exception:  # it cannot be copied, or is too large, has one dtype alone, or differs there too
        return False
    return True


def described(error: Exception) -> str:
    """Return an error as one line of the log."""
    return f"{type(error).__name__}: {error}"


class Rehearsal:
    """The passes of a rehearsal; none of them counts as one of the step's.

    The losses are scaled here as under the batch's scaler, which is not told. With ``exact`` the model runs in another
    precision.
    """

    def __init__(self, f: Oracle, batch: Batch, m: int | None, draws: Draws, exact: Exact | None = None) -> None:
        self.n, self.m, self.seed, self.exact = len(batch), m or 1, f.step, exact
        self.parts = MicroBatches(self.n, self.m)
        self.within = None if m is None else self.parts  # examples of one may influence one another
        self.tensors = [exact.copy(p) if exact else p for p in f.passes.parameters.tensors]
        self.heard = Heard(batch.loss, float(batch.loss_scale(self.tensors[0].detach())), draws, exact)
        self.modules = [*batch.modules(), *(one for one in of_loss(batch) if isinstance(one, nn.Module))]
        self.batch = copy(batch)
        self.batch.loss, self.batch.scaler = self.heard, None
        self.ranks = replace(f.passes.ranks, begun=True)
        self.ranks.stay_within()
        size = float(Vector([p.detach() for p in self.tensors]).norm())
        larger = max(1.0, VISIBLE * size / f.rho.largest())
        self.parameters = Parameters(self.tensors, Radii([larger * rho for rho in f.rho.values]))

    def plan(self, tracked: Tracked) -> SharingPlan:
        """Find where examples lie, and how far rounding goes."""
        first, plan = self.placed(tracked.of_tensors(self.tensors))
        seen = [*(d for site in first.sites for d in site.deltas), *self.heard.losses[-1:]]
        rounding = Rounding.of(seen, exact=self.exact is not None)
        self.rounding = rounding.of_model(self.first_part, self.tensors, self.heard.scale)
        plan.apply(first)
        return replace(plan, cost=relative_cost(first))

    # ---- where examples lie

    def placed(self, tracked: Tracked) -> tuple[FirstPass, SharingPlan]:
        """Return a first pass, and the plan that follows from it, if both ways agree."""
        for _ in range(3):
            first = FirstPass(tracked, LAYERS, self.within)
            weights = self.two_backwards(first)
            if not first.sites:
                raise CannotFactor("no perturbed parameter takes part in the loss")
            found = {id(site): first.place(site, weights) for site in first.sites}
            misfits = [site for site in first.sites if found[id(site)] is None]
            lookups = {site.lookup for site in misfits if isinstance(site.map, Lookup)}
            if lookups <= tracked.unbatched:
                break
            tracked = replace(tracked, unbatched=tracked.unbatched | lookups)  # repeat positions for every example
        if misfits:
            raise Differs(f"examples influence one another at {first.label(misfits[0])}")
        for site in first.sites:
            del site.deltas[1:]
        first.check()
        known = tuple(place for place in found.values() if place is not None)
        proven = Proven(calls=first.calls)
        proven.add(first.path(), known)
        return first, SharingPlan(tracked, proven=proven)

    def two_backwards(self, first: FirstPass) -> Tensor:
        """Run one forward, and the backward of the mean and of a sum whose random weights tell examples apart.

        Returns:
            The weights.
        """
        with Passes(self.batch, self.parameters).one(away=True):
            kernels = Kernels(first)
            with kernels, running(self.batch.model, first):
                losses = self.batch.losses()
            kernels.check()
            if not losses.isfinite().all():
                raise Unsure("the losses of this batch are not finite")
            order = torch.randperm(first.independent, generator=generator(self.seed, 0))
            weights = 2.0 ** (order % 5 - 4)  # powers of two commute with rounding, TF32's too
            if self.heard.scale <= 1 and losses.dtype not in LOW:  # gradients above the loop's: a clamp of them bites
                weights *= 2.0 ** (self.parts.k.bit_length() + 1)
            weights = (self.parts.spread(weights) if self.within is not None and first.mixes else weights).to(losses)
            smaller = self.first_backward(losses, first)
            (losses @ weights * (smaller / self.n)).backward()
        self.heard.scale *= smaller
        return weights

    def first_backward(self, losses: Tensor, first: FirstPass) -> float:
        """Run the backward of the mean, and return what has to multiply the losses for it to fit well in float16."""
        smaller = 1.0
        while True:
            (losses.mean() * smaller).backward(retain_graph=True)
            if self.heard.scale * smaller <= 1 or all(
                float(p.grad.abs().max()) < 1e3 for p in self.tensors if p.grad is not None and p.numel()
            ):
                return smaller
            smaller = max(1 / self.heard.scale, smaller / 64)
            drop(self.tensors)
            for site in first.sites:
                site.deltas.clear()

    # ---- both ways

    def prove(self, plan: SharingPlan, permuted: bool) -> None:
        """Make the update both ways, on the batch or on a permutation of its examples, and raise unless they agree."""
        random, n, m, k = generator(self.seed, self.n), self.n, self.m, self.parts.k
        batch = self.batch.subset(torch.randperm(n, generator=random)) if permuted else self.batch
        others = (torch.randperm(k, generator=random) + k - 1) % k  # any order
        chosen = list(dict.fromkeys([0, k - 1, *others.tolist()]))[:TRIED]  # the first, the last, and random ones
        rows = torch.cat([torch.arange(j * m, min(n, (j + 1) * m)) for j in chosen])
        trial, parts, before = self.oracle(batch), batch.split(m), self.buffers()
        (ours, after), together = self.hear(lambda: (self.shared(trial, plan, rows), self.buffers()))
        trial.passes.counted = False
        theirs, alone = self.hear(lambda: reduce(add, [self.serial(trial, parts[j], j) for j in chosen]))
        by_pass = [torch.cat(alone[i::2]) for i in range(len(together))]
        for whole, single in zip(together, by_pass, strict=True):
            self.rounding.check_losses(whole[rows.to(whole.device)], single, by_pass[0], self.heard.scale)
        if not all(map(torch.equal, before, after)):
            self.rounding.check_buffers(after, self.buffers_of_loop(parts))
        self.rounding.check_gradients(ours.materialised(), theirs.materialised(), plan.tracked.names)

    def check_held(self, held: Held) -> None:
        """Raise where losses depend on what every pass changes in attributes: the loop makes more passes."""
        part, losses = self.batch.split(self.m)[0], list[Tensor]()
        with frozen_statistics(self.modules), torch.no_grad():
            for change in (list, held.advance):
                names = change()
                with self.drawing(part, 0):
                    losses.append(part.losses())
        if names and not torch.allclose(losses[0], losses[1]):
            raise Differs(f"the loss depends on {names[0]}, which every forward pass changes")

    def first_part(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return the losses of the first micro-batch by itself, at ``w`` and ``w + eps``, and its update."""
        trial = self.oracle(self.batch)
        update, losses = self.hear(lambda: self.serial(trial, self.batch.split(self.m)[0], 0))
        return torch.cat(losses), update.materialised()

    def oracle(self, batch: Batch) -> Oracle:
        """Return an oracle whose passes count as nobody's."""
        return Oracle(batch, self.parameters, declares=Declaration(g=False), ranks=self.ranks)

    def hear(self, run: Callable[[], T]) -> tuple[T, list[Tensor]]:
        """Return what a function returns, and the losses of its passes; running statistics are restored."""
        self.heard.losses.clear()
        with frozen_statistics(self.modules):
            return run(), self.heard.losses.copy()

    def shared(self, trial: Oracle, plan: SharingPlan, rows: Tensor) -> Vector:
        """Return the sum over some micro-batches of ``size / n`` times the gradient at ``w + eps_k``."""
        recorded = record(trial, plan, self.within, (self.parts, TWO_PASSES))
        second = second_pass(trial, recorded, self.parts, Euclidean().radial)
        weights = torch.zeros(self.n, dtype=torch.float64).index_fill(0, rows, 1 / self.n)
        with trial.passes.away_from_w():
            made = trial.passes.gradient(weights=weights, under=running(self.batch.model, second))
        plan.proven.calls.update(recorded.first.calls | second.calls)
        return made

    def serial(self, trial: Oracle, part: Batch, k: int) -> Vector:
        """Return the same of micro-batch ``k`` by itself."""
        with self.drawing(part, k):
            return len(part) / self.n * Rule()(trial.part(part)).grad

    def buffers_of_loop(self, parts: Sequence[Batch]) -> list[Tensor]:
        """Return the buffers after the forwards of all micro-batches."""
        with frozen_statistics(self.modules), torch.no_grad():
            for k, part in enumerate(parts):
                with self.drawing(part, k):
                    part.losses()
            return self.buffers()

    def buffers(self) -> list[Tensor]:
        """Return copies of the model's buffers."""
        return [b.clone() for m in self.modules for b in m._buffers.values() if b is not None]

    @contextmanager
    def drawing(self, part: Batch, k: int) -> Iterator[None]:
        """Let micro-batch ``k`` draw the random numbers that it has in the batch."""
        self.heard.part = slice(k * self.m, k * self.m + len(part))
        try:
            yield
        finally:
            self.heard.part = None
