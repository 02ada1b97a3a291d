"""Shared passes: m-SAM, RW-SAM and SAM by the per-example gradients of one pass over the whole batch."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from steppe.batch import Batch, Batches
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.replay import RandomState, Snapshot
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.factored.collect import TWO_PASSES, WEIGHTED, Recorded
from steppe.factored.microbatches import MicroBatches
from steppe.factored.plans import Entry, entry_for, prove
from steppe.factored.rehearsal import described
from steppe.factored.shared import NotProven, SharingPlan, record, running, second_pass
from steppe.factored.sites import CannotFactor
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
        # by the batch, kept so that its id is not used again, and the size of micro-batches
        self._entries: dict[Any, tuple[Batch, Entry]] = {}
        self._recorded: tuple[Oracle, Recorded] | None = None  # between example_norms and weighted_gradient

    # ---- m-SAM

    def update(self, f: Oracle, rule: AnyRule, m: int | None) -> Update | None:
        """Return the update of ``Micro(m, rule)``, or for ``m=None`` of ``rule``, from two passes over the batch.

        Return ``None`` where the rule or the model does not allow it, or where the plain way is cheaper.

        Raises:
            ValueError: ``parallel=True``, and the rule or the model does not allow it; the message says why.
        """
        by_example = getattr(f.passes.closure, "per_example", True)
        weights = example_weighting(rule) if type(rule) is Rule and by_example else None
        if weights is None and self.parallel is True and m is not None:
            raise _refusal(f"micro-batches of {rule!r} run in a loop{'' if by_example else ' on a MeanBatch'}")
        if type(rule) is not Rule or weights is None or not self._worth(f, m, weights):
            return None
        n = len(f.batch())
        parts = MicroBatches(n, n if m is None else m)
        reweighted = weights == "norms"  # which are known only after the whole pass
        proven_for = None if reweighted else parts.m
        g_adv = self._tried(f, proven_for, lambda plan: self._g_adv(f, plan, rule, parts, reweighted))
        if g_adv is None:
            if m is not None and self.parallel == "auto":
                self.entry(f, f.batch(), proven_for).warn(m, parts.k)
            return None
        self.entry(f, f.batch(), proven_for).failed.clear()
        f.passes.log.compare(f.g if f.needs_g else None, g_adv)
        return rule.combine(f, g_adv)

    def _g_adv(self, f: Oracle, plan: SharingPlan, rule: Rule, parts: MicroBatches, reweighted: bool) -> Vector:
        """Return the mean over micro-batches of the gradients at ``w + eps_k``, from both passes."""
        needs_g = f.needs_g
        if reweighted:
            recorded = _recorded(f, plan, needs_g=needs_g)
            _reweight(recorded, parts, rule)
        else:
            recorded = _recorded(f, plan, parts, (parts, TWO_PASSES), needs_g)
        second = second_pass(f, recorded, parts, rule.geometry.radial)  # type: ignore[attr-defined]
        if needs_g:
            f.g = recorded.g
        with f.passes.away_from_w():
            g_adv = f.passes.gradient(under=running(f.batch().model, second))
        plan.covers(second)
        return g_adv

    def _worth(self, f: Oracle, m: int | None, weights: str) -> bool:
        """Return whether to try: one micro-batch, or two on a CPU, gain only where factors save multiplications.

        Two share passes where they are asked to. Plain SAM on a whole batch runs as it is: its memory is that of a
        closure, and nothing need be proven.
        """
        if m is None:
            if weights == "uniform" or f.needs_g:
                return False
        elif len(f.batch()) > (m if f.passes.parameters.devices or self.parallel is True else 2 * m):
            return True
        return self._cheaper_than_sam(f, m if weights == "uniform" else None)

    def _cheaper_than_sam(self, f: Oracle, m: int | None) -> bool:
        """Return whether factors save multiplications in the two passes of plain SAM."""
        if self.parallel != "auto" or not f.is_whole or not f.passes.ranks.alone:
            return False
        batch = f.passes.closure
        if not isinstance(batch, Batch) or isinstance(batch, Batches):  # whose factors are held one batch at a time
            return False
        plan = self.entry(f, batch, m).plan
        return not plan.reason and plan.cost < 0.95

    # ---- RW-SAM

    def example_norms(self, f: Oracle) -> Tensor | None:
        """Return ``norm(grad f_i)`` of every example, shape ``(n,)``; ``None`` where the model does not factor.

        The factors are kept for the weighted gradient, and ``g`` comes from the same pass where it is asked for later.
        Those of accumulated batches are held one batch at a time, in additional passes; the weighted gradient is then
        an ordinary pass over all of them.
        """
        with f.passes.ranks.within():
            if isinstance(f.passes.closure, Batches):
                norms = self._norms_by_batch(f, f.passes.closure)
            else:
                found = self.norms_of_examples(f, f.needs_g)
                norms, self._recorded = (None, None) if found is None else (found[0], (f, found[1]))
        norms = self._agreed(f, norms)
        if self._recorded is not None and self._recorded[0] is f and f.needs_g:
            f.g = f.passes.ranks.shared_gradient(self._recorded[1].g, f.passes.parameters.tensors)
        return norms

    def norms_of_examples(self, f: Oracle, needs_g: bool = False) -> tuple[Tensor, Recorded] | None:
        """Return ``norm(grad f_i)`` of one batch's examples, and what the first pass has recorded."""

        def run(plan: SharingPlan) -> tuple[Tensor, Recorded]:
            by_example = MicroBatches(len(f.batch()), 1)
            recorded = _recorded(f, plan, None, (by_example, WEIGHTED), needs_g)
            return recorded.norms(by_example), recorded

        return self._tried(f, None, run)

    def weighted_gradient(self, f: Oracle, weights: Tensor) -> Vector | None:
        """Return ``sum_i p_i grad f_i`` from the factors of :meth:`example_norms`; ``None`` without them."""
        if self._recorded is None or self._recorded[0] is not f:
            return None
        (_, recorded), self._recorded = self._recorded, None
        d = self._agreed(f, self._tried(f, None, lambda _: recorded.weighted(weights)))
        if d is not None:
            self.entry(f, f.batch()).failed.clear()
        return d

    def _agreed(self, f: Oracle, found: T | None) -> T | None:
        """Return the result if all ranks that share gradients have one, else ``None``."""
        found = f.passes.ranks.agreed(found, f.passes.parameters.device)
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
                norms = self.norms_of_examples(part)
                if norms is None:
                    break
                entry.failed.clear()
                found.append(norms[0])
        return torch.cat(found) if len(found) == len(entries) else None

    def recorded(self, f: Oracle, needs_g: bool) -> Recorded:
        """Return the first pass of one batch, with the factors of its examples' gradients, and with ``g`` if asked.

        Raises:
            ValueError: the model does not factor; the message says why. The engine is one with ``parallel=True``.
        """
        made = self._tried(f, None, lambda plan: _recorded(f, plan, needs_g=needs_g))
        assert made is not None
        return made

    # ---- plans

    def entry(self, f: Oracle, batch: Batch, m: int | None = None) -> Entry:
        """Return the entry of the batch's model for micro-batches of ``m``, ``None`` for single examples.

        A step that asks again gets the same one.
        """
        asked = id(batch), m
        if asked not in self._entries:
            self._entries[asked] = batch, entry_for(f, batch, m)
        return self._entries[asked][1]

    def _tried(self, f: Oracle, m: int | None, run: Callable[[SharingPlan], T], again: bool = True) -> T | None:
        """Return what a proven plan gives; ``None`` where the loop has to, from the same random numbers.

        Raises:
            ValueError: ``parallel=True`` excludes the loop, and the model does not factor.
            Exception: ``parallel=True`` excludes the loop; any other error is raised again.
        """
        batch = f.batch("its examples' gradients")
        entry = self.entry(f, batch, m)
        if not self._allowed(entry.plan):
            return None
        before, buffers = RandomState.now(f.passes.parameters.devices), Snapshot(batch.modules())
        counted, new = f.passes.counted, ""
        try:
            return run(entry.plan)
        except NotProven as error:
            new = str(error)
        except Exception as error:  # an error of the model itself: the loop will raise it again
            self._fail(f, entry, error)
        before.restore()  # here the error, and with it what was recorded, is gone
        buffers.restore()
        f.passes.counted = counted
        if not new:
            return None
        if again and prove(entry, f, batch, m):
            return self._tried(f, m, run, again=False)
        if self.parallel is True:
            raise _refusal(entry.plan.reason or new)
        if not entry.plan.reason:
            entry.fail(new, f.step)
        return None

    def adds(self, f: Oracle, batch: Batch) -> bool:
        """Return whether the batch's gradient is the weighted mean of its parts', as no example changes another's."""
        return batch.per_example and not self.entry(f, batch).plan.reason

    def _allowed(self, plan: SharingPlan) -> bool:
        """Return whether micro-batches may share passes; raise why not where ``parallel=True`` was asked for."""
        if plan.reason and self.parallel is True:
            raise _refusal(plan.reason)
        return not plan.reason

    def _fail(self, f: Oracle, entry: Entry, error: Exception) -> None:
        """Note an error in the shared passes, or raise it where ``parallel=True`` excludes the loop."""
        final = isinstance(error, CannotFactor) and error.final
        if self.parallel is True and not final:
            raise error
        entry.fail(str(error) if final else described(error), None if final else f.step)
        if self.parallel is True:
            raise _refusal(str(error)) from error


def example_weighting(rule: Rule) -> str | None:
    """Return how the rule weighs examples, if its micro-batches may share passes: all of them, radial, linear."""
    shareable = declared(rule.geometry).radial and declared(rule.select).whole_batch and declared(rule.combine).linear
    return declared(rule.sample).weights if shareable else None


def _recorded(f: Oracle, plan: SharingPlan, *options: Any, **named: Any) -> Recorded:
    """Return the first pass of a step, with the options of :func:`record`; it may do nothing but what was proven."""
    recorded = record(f, plan, *options, **named)
    plan.covers(recorded.first)
    return recorded


def _refusal(reason: str) -> ValueError:
    return ValueError(f"parallel must be 'auto' or False here: {reason}")


def _reweight(recorded: Recorded, parts: MicroBatches, rule: Rule) -> None:
    """Turn every micro-batch's gradient into ``sum_i p_i grad f_i``, with weights over its own examples."""
    norms = recorded.norms(MicroBatches(recorded.n, 1))
    p = [rule.sample.weights(norms[a:b].reshape(-1, m)) * m for a, b, m in parts.spans]  # type: ignore[attr-defined]
    recorded.scale(torch.cat([chunk.flatten() for chunk in p]))
