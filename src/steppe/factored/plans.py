"""The verdicts on the models seen so far: which share passes, and which run in a loop."""

import logging
import re
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from steppe.batch import Batch
from steppe.engine.nested import leaves
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters
from steppe.engine.replay import capturing
from steppe.factored.microbatches import MicroBatches
from steppe.factored.verify import SharingPlan, has_hooks, verified

log = logging.getLogger("steppe")

TRIES = 3  # steps that may fail for a reason other than the model


@dataclass
class Entry:
    """What is known of one model, data shape and mode.

    A model that does not factor always runs in a loop. Memory, data or a device may fail one step and not the next:
    after ``TRIES`` failed steps without a successful one between them, all later steps run in a loop too. A step that
    the loop cannot take either is the same step when it is tried again, so it counts once.

    Attributes:
        plan: the layouts of the model's sites, or why there are none.
        uses: how many steps have asked.
        failed: the steps that failed since the shared passes last succeeded.
        logged: the kinds of message that have been logged.
    """

    plan: SharingPlan
    uses: int = 0
    failed: set[int] = field(default_factory=set)
    logged: set[str] = field(default_factory=set)

    def due(self) -> bool:
        """Return whether to verify again, because data may change what a model does."""
        if self.plan.reason:
            return not self.plan.final and len(self.failed) < TRIES
        return self.uses in (1, 10, 100) or self.uses % 1000 == 0

    def learn(self, plan: SharingPlan, step: int) -> None:
        """Take over a new verdict, unless this batch could not tell."""
        if plan.final or self.plan.reason:
            self.plan = plan
            if plan.reason:
                self.fail(plan.reason, None if plan.final else step)

    def fail(self, reason: str, step: int | None = None) -> None:
        """Log that this step, or with ``None`` every later step, runs in a loop; each kind of reason is logged once."""
        if step is not None:
            self.failed.add(step)
        always = step is None or len(self.failed) >= TRIES
        if always and not self.plan.reason:
            self.plan = SharingPlan(self.plan.tracked, reason=reason)
        kind = re.sub(r"\d+", "", reason) + str(always)  # numbers of bytes differ from step to step
        if kind not in self.logged:
            self.logged.add(kind)
            log.info("micro-batches run in a loop%s: %s", "" if always else " in this step", reason)

    def succeed(self) -> None:
        """Forget the failed steps."""
        self.failed.clear()


_entries: WeakKeyDictionary[nn.Module, dict[Any, Entry]] = WeakKeyDictionary()


def entry_for(f: Oracle, batch: Batch, parts: MicroBatches | None = None) -> Entry:
    """Return the entry of this model, data shape and choice of perturbed parameters, verified where that is due.

    Where examples influence one another, as in batch normalisation, every size of micro-batches has its own entry.

    Args:
        f: the oracle.
        batch: the batch, of this step.
        parts: the micro-batches within which examples may influence one another; ``None`` where none may.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the model has not been verified before.
    """
    entries = _entries.setdefault(batch.model, {})
    key = _key(f.passes.parameters, batch)
    of_m = (*key, None if parts is None else parts.m)
    entry = entries.get(key) or entries.get(of_m)
    captured = capturing(f.passes.parameters.devices)
    if entry is None and captured:
        raise RuntimeError(
            "take this step once before it is captured in a CUDA graph: its model has to be verified first"
        )
    if entry is None or (entry.due() and not captured):
        plan = verified(f, batch, parts)
        entry = entry or entries.setdefault(of_m if plan.mixes else key, Entry(plan))
        entry.learn(plan, f.step)
    entry.uses += 1
    return entry


def refusal(reason: str) -> ValueError:
    """Return the error for ``parallel=True`` where micro-batches cannot share passes."""
    return ValueError(f"parallel must be 'auto' or False here: {reason}")


def _key(parameters: Parameters, batch: Batch) -> Any:
    modules = batch.modules()
    loss = getattr(batch.loss, "criterion", batch.loss)
    return (
        tuple((t.shape, t.dtype, t.device) for t in leaves(batch.data)),
        tuple(map(id, parameters.tensors)),
        tuple(parameters.movable),
        tuple([m.training for m in modules]),
        tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")),
        any([m._backward_hooks or m._backward_pre_hooks or m._compiled_call_impl for m in modules]),  # noqa: C419
        any(map(has_hooks, parameters.tensors)),
        getattr(loss, "__code__", type(loss)),
    )
