"""Shared passes: m-SAM, RW-SAM and SAM by the per-example gradients of one pass over the whole batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from steppe.batch import Batch, Batches
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.replay import RandomState, Snapshot
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.factored.black_box import black_boxes
from steppe.factored.collect import TWO_PASSES, WEIGHTED, Collector, Recorded
from steppe.factored.gradients import squared_norms, uncast
from steppe.factored.layers import LAYERS
from steppe.factored.microbatches import MicroBatches
from steppe.factored.passes import CannotFactor, FirstPass, SecondPass, Site
from steppe.factored.plans import Entry, entry_for, refusal
from steppe.factored.verify import SharingPlan, described
from steppe.pieces.protocol import declared
from steppe.rule import Rule

T = TypeVar("T")


class SharedPasses:
    """The shortcuts of one step (:class:`steppe.engine.oracle.Shortcuts`), for a batch whose model factors.

    Args:
        parallel: ``"auto"`` shares passes where the model allows it and it is cheaper. ``True`` always does, or raises.
            ``False`` never does.
    """

    def __init__(self, parallel: bool | str = "auto") -> None:
        self.parallel = parallel
        self._entries: dict[Any, tuple[Batch, Entry]] = {}  # by id of the batch, kept so that it is not reused, and m
        self._recorded: tuple[Oracle, Recorded] | None = None  # between example_norms and weighted_gradient

    # ---- m-SAM

    def update(self, f: Oracle, rule: AnyRule, m: int | None) -> Update | None:
        """Return the update of ``Micro(m, rule)``, or for ``m=None`` of ``rule``, from two passes over the batch.

        Return ``None`` where the rule or the model does not allow it, or where the loop is cheaper.

        Raises:
            ValueError: ``parallel=True``, and the rule or the model does not allow it; the message says why.
        """
        by_example = getattr(f.passes.closure, "per_example", True)
        weights = example_weighting(rule) if type(rule) is Rule and by_example else None
        if weights is None and self.parallel is True and m is not None:
            raise refusal(f"micro-batches of {rule!r} run in a loop{'' if by_example else ' on a MeanBatch'}")
        if type(rule) is not Rule or weights is None or not self._worth(f, m):
            return None
        n = len(f.batch())
        parts = MicroBatches(n, n if m is None else m)
        before, needs_g = RandomState.now(f.passes.parameters.devices), f.needs_g
        reweighted = weights == "norms"  # which are known only after the whole pass
        if reweighted:
            recorded = self.first_pass(f, needs_g)
        else:
            recorded = self.first_pass(
                f, needs_g, lambda first: Collector(first, parts, TWO_PASSES, f.rho.values), parts
            )
        if recorded is None:
            return None
        try:
            if reweighted:
                _reweight(recorded, parts, rule)
            second = _second_pass(f, recorded, parts, rule)
            if needs_g:
                f.g = recorded.g
            with f.passes.away_from_w():
                g_adv = f.passes.gradient(under=black_boxes(f.batch().model, second))
        except Exception as error:  # an error of the model itself: the loop will raise it again
            self._fall_back(f, recorded.first.parts, error, before)
            return None
        self.entry(f, f.batch(), recorded.first.parts).succeed()
        f.passes.log.compare(f.g if needs_g else None, g_adv)
        return rule.combine(f, g_adv)

    def _worth(self, f: Oracle, m: int | None) -> bool:
        """Return whether to try: one micro-batch, or two on a CPU, gain only where plain SAM does."""
        if m is None:
            return not f.needs_g and self._cheaper_than_sam(f)
        few = 1 if f.passes.parameters.devices else 2
        return len(f.batch()) > few * m or self.parallel is True or self._cheaper_than_sam(f)

    def _cheaper_than_sam(self, f: Oracle) -> bool:
        """Return whether factors save multiplications in the two passes of plain SAM."""
        if self.parallel != "auto" or not f.is_whole or not f.passes.ranks.alone:
            return False
        batch = f.passes.closure
        if not isinstance(batch, Batch) or isinstance(batch, Batches):  # whose factors are held one batch at a time
            return False
        plan = self.entry(f, batch, MicroBatches(len(batch), len(batch))).plan
        return not plan.reason and plan.cost < 0.95

    # ---- RW-SAM

    def example_norms(self, f: Oracle) -> Tensor | None:
        """Return ``norm(grad f_i)`` of every example, shape ``(n,)``; ``None`` where the model does not factor.

        The factors are kept for the weighted gradient, and ``g`` comes from the same pass where it is asked for later.
        Those of accumulated batches are held one batch at a time, in additional passes; the weighted gradient is then
        an ordinary pass over all of them.
        """
        recorded = None
        if not self.parallel:
            return None
        with f.passes.ranks.within():
            if isinstance(f.passes.closure, Batches):
                norms = self._norms_by_batch(f, f.passes.closure)
            else:
                recorded = self.first_pass(f, f.needs_g, collector=_by_example)
                norms = None if recorded is None else self._or_fall_back(f, recorded, recorded.by_example)
                self._recorded = None if recorded is None or norms is None else (f, recorded)
        norms = self._agreed(f, norms)
        if norms is not None and recorded is not None and f.needs_g:
            f.g = f.passes.ranks.shared_gradient(recorded.g, f.passes.parameters.tensors)
        return norms

    def weighted_gradient(self, f: Oracle, weights: Tensor) -> Vector | None:
        """Return ``sum_i p_i grad f_i`` from the factors of :meth:`example_norms`; ``None`` without them."""
        if self._recorded is None or self._recorded[0] is not f:
            return None
        (_, recorded), self._recorded = self._recorded, None
        d = self._agreed(f, self._or_fall_back(f, recorded, lambda: recorded.weighted(weights)))
        if d is not None:
            self.entry(f, f.batch()).succeed()
        return d

    def _agreed(self, f: Oracle, found: T | None) -> T | None:
        """Return the result if all ranks that share gradients have one, else ``None``."""
        found = f.passes.ranks.agreed(found, f.passes.parameters.tensors[0].device)
        if found is None:
            self._recorded = None
        return found

    def _norms_by_batch(self, f: Oracle, batches: Batches) -> Tensor | None:
        entries = [self.entry(f, batch) for batch in batches.chunks]
        if not all(self._allowed(entry.plan) for entry in entries):
            return None
        found: list[Tensor] = []
        with f.passes.trial():
            for (_, part), entry in zip(f.parts(batches.chunks), entries, strict=True):
                recorded = self.first_pass(part, collector=_by_example)
                norms = None if recorded is None else self._or_fall_back(part, recorded, recorded.by_example)
                if norms is None:
                    break
                entry.succeed()
                found.append(norms)
                del recorded
        return torch.cat(found) if len(found) == len(entries) else None

    def _or_fall_back(self, f: Oracle, recorded: Recorded, make: Callable[[], T]) -> T | None:
        before = RandomState.now(f.passes.parameters.devices)
        try:
            return make()
        except Exception as error:
            self._fall_back(f, None, error, before)
        return None

    # ---- the first pass

    def first_pass(
        self,
        f: Oracle,
        needs_g: bool = False,
        collector: Callable[[FirstPass], Collector] | None = None,
        parts: MicroBatches | None = None,
    ) -> Recorded | None:
        """Run the first pass and return its factors; ``None`` where the model does not factor.

        Args:
            f: the oracle, of one batch.
            needs_g: whether to compute ``g`` too.
            collector: makes a collector of gradients, which works and frees factors during the backward pass.
            parts: the micro-batches within which examples may influence one another; ``None`` where none may.

        Raises:
            ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
        """
        batch = f.batch("its examples' gradients")
        plan = self.entry(f, batch, parts).plan
        if not self._allowed(plan):
            return None
        parameters = f.passes.parameters
        before, buffers = RandomState.now(parameters.devices), Snapshot(batch.modules() if plan.mixes else ())
        first = FirstPass(plan.tracked, LAYERS, parts, plan.pool)
        collecting = collector(first) if collector else None
        first.on_delta = None if collecting is None else _collecting(collecting, plan)
        try:
            wrt = None if needs_g else [False] * len(parameters.tensors)
            g = f.passes.gradient(wrt=wrt, under=black_boxes(batch.model, first))
            first.check()
            plan.apply(first)
            scale = batch.loss_scale(parameters.tensors[0].detach())
            collected = None if collecting is None else collecting.gradients()
            return Recorded(first, len(batch), parameters.tensors, g, scale, collected)
        except Exception as error:  # an error of the model itself: the loop will raise it again
            buffers.restore()
            self._fall_back(f, parts, error, before)
        finally:
            first.on_delta = None  # breaks the reference cycle that would keep the gradients
        return None

    def adds(self, f: Oracle, batch: Batch) -> bool:
        """Return whether the batch's gradient is the weighted mean of its parts', as no example changes another's."""
        return batch.per_example and not self.entry(f, batch).plan.reason

    def entry(self, f: Oracle, batch: Batch, parts: MicroBatches | None = None) -> Entry:
        """Return the entry of the batch's model; a step that asks again gets the same one."""
        key = id(batch), parts
        if key not in self._entries:
            self._entries[key] = batch, entry_for(f, batch, parts)
        return self._entries[key][1]

    def _allowed(self, plan: SharingPlan) -> bool:
        """Return whether micro-batches may share passes.

        Raises:
            ValueError: they may not, and ``parallel=True`` was asked for; the message says why.
        """
        if not plan.reason:
            return True
        if self.parallel is True:
            raise refusal(plan.reason)
        return False

    def _fall_back(self, f: Oracle, parts: MicroBatches | None, error: Exception, before: RandomState) -> None:
        """Restore the random state for the loop, after an error in the shared passes.

        Raises:
            ValueError: ``parallel=True`` excludes the loop, and the model does not factor.
            Exception: ``parallel=True`` excludes the loop; any other ``error`` is raised again.
        """
        entry = self.entry(f, f.batch(), parts)
        if isinstance(error, CannotFactor):
            entry.fail(str(error))
        elif self.parallel is True:
            raise error
        else:
            entry.fail(described(error), f.step)
        before.restore()
        if self.parallel is True:
            raise refusal(str(error)) from error


def example_weighting(rule: Rule) -> str | None:
    """Return how the rule weighs examples, if its micro-batches may share passes: all of them, radial, linear."""
    shareable = declared(rule.geometry).radial and declared(rule.select).whole_batch and declared(rule.combine).linear
    return declared(rule.sample).weights if shareable else None


def _collecting(collector: Collector, plan: SharingPlan) -> Callable[[Site], None]:
    def collect(site: Site) -> None:
        if site.layout is None:  # the first one
            plan.apply(collector.first)
        with uncast(site.deltas[0]):
            collector.take(site)
        site.free()

    return collect


def _by_example(first: FirstPass) -> Collector:
    return Collector(first, MicroBatches(first.tracked.n, 1), WEIGHTED)


def _reweight(recorded: Recorded, parts: MicroBatches, rule: Rule) -> None:
    """Turn every micro-batch's gradient into ``sum_i p_i grad f_i``, with weights over its own examples."""
    norms = recorded.norms(MicroBatches(recorded.n, 1))
    p = [rule.sample.weights(norms[a:b].reshape(-1, m)) * m for a, b, m in parts.spans]  # type: ignore[attr-defined]
    recorded.scale(torch.cat([chunk.flatten() for chunk in p]))


def _second_pass(f: Oracle, recorded: Recorded, parts: MicroBatches, rule: Rule) -> SecondPass:
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
        factor = rule.geometry.radial(norms) * per_mean  # type: ignore[attr-defined]
        scale = {radius: radius * factor for radius in squares}
        eps = {i: scale[rho[i]].reshape(-1, *[1] * (t.dim() - 1)) * t for i, t in small.items()}
        eps_squares = reduce(add, (scale[radius].square() * square for radius, square in squares.items()))
        _log(f, norms, eps_squares.clamp_min(0).sqrt(), parts.sizes(total) / recorded.n)
    for site in recorded.first.sites:
        site.free()
    big = {i: (gradient, scale[rho[i]]) for i, gradient in matrices.items()}
    return SecondPass(recorded.first.tracked, LAYERS, recorded.first.sites, parts, big, eps)


def _with(radius: float, found: Mapping[int, T], rho: Sequence[float]) -> list[T]:
    return [value for i, value in found.items() if rho[i] == radius]


def _log(f: Oracle, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
    """Log the mean over micro-batches of the norms, shape ``(k,)``."""
    if f.passes.scale is not None:
        f.passes.scale.watch(g_norms)
    f.passes.log.norms.append(g_norms.sum())
    f.passes.log.numbers["g_norm"] = g_norms @ shares
    f.passes.log.numbers["eps_norm"] = eps_norms @ shares
