"""The plans of the models seen so far."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from steppe.batch import Batch, leaves
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters
from steppe.engine.replay import capturing
from steppe.factored.rehearsal import Plan, has_hooks, rehearsed

log = logging.getLogger("steppe")

TRIES = 3  # steps that may go wrong for another reason than the model's


@dataclass
class Entry:
    """What is known of one model, data shape and mode.

    A model that does not factor is serial for good. Memory, data or a device may fail a step and not the next: only
    ``TRIES`` steps without one that succeeds between them are for good too. A step that the serial loop cannot take
    either does not count twice, because it is the same step until one is taken.
    """

    plan: Plan
    uses: int = 0
    failed: set[int] = field(default_factory=set)  # steps, since the shared passes last succeeded
    said: set[str] = field(default_factory=set)

    def due(self) -> bool:
        """Whether to rehearse again: data may change what a model does, so at times; where nothing was learnt."""
        if self.plan.reason:
            return not self.plan.final and len(self.failed) < TRIES
        return self.uses in (1, 10, 100) or self.uses % 1000 == 0

    def learn(self, plan: Plan, step: int) -> None:
        """Take over what a rehearsal found."""
        if plan.final or self.plan.reason:  # else this batch tells nothing new
            self.plan = plan
            if plan.reason:
                self.fail(plan.reason, None if plan.final else step)

    def fail(self, reason: str, step: int | None = None) -> None:
        """Run this step serially, if it is given, or all that follow; one line in the log a reason."""
        if step is not None:
            self.failed.add(step)
        for_good = step is None or len(self.failed) >= TRIES
        if for_good and not self.plan.reason:
            self.plan = Plan(self.plan.tracked, reason=reason)
        kind = re.sub(r"\d+", "", reason) + str(for_good)  # numbers of bytes differ from step to step
        if kind not in self.said:
            self.said.add(kind)
            log.info("micro-batches run one after the other%s: %s", "" if for_good else " in this step", reason)

    def succeed(self) -> None:
        """The shared passes have made a step."""
        self.failed.clear()


_entries: WeakKeyDictionary[nn.Module, dict[Any, Entry]] = WeakKeyDictionary()


def entry_for(f: Oracle, batch: Batch) -> Entry:
    """Return the entry of this model, data shape and choice of perturbed parameters, rehearsed where that is due."""
    entries = _entries.setdefault(batch.model, {})
    key = _key(f.passes.parameters, batch)
    entry = entries.get(key)
    captured = capturing(f.passes.parameters.devices)
    if entry is None and captured:
        raise RuntimeError("take this step once before it is captured in a CUDA graph: its model is to be rehearsed")
    if entry is None or (entry.due() and not captured):
        plan = rehearsed(f, batch)
        entry = entry or entries.setdefault(key, Entry(plan))
        entry.learn(plan, f.step)
    entry.uses += 1
    return entry


def refusal(reason: str) -> ValueError:
    """What ``parallel=True`` gets for a model that does not factor."""
    return ValueError(f"parallel must be 'auto' or False for this model: {reason}")


def _key(parameters: Parameters, batch: Batch) -> Any:
    shapes = tuple((t.shape, t.dtype, t.device) for t in leaves(batch.data))
    modules = batch.modules()
    modes = tuple([m.training for m in modules])
    watched = any([m._backward_hooks or m._backward_pre_hooks or m._compiled_call_impl for m in modules])  # noqa: C419
    hooks = any(map(has_hooks, parameters.tensors))
    autocast = tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda"))
    loss = getattr(batch.loss, "criterion", batch.loss)
    kind = getattr(loss, "__code__", type(loss))
    return (
        shapes,
        tuple(map(id, parameters.tensors)),
        tuple(parameters.movable),
        modes,
        autocast,
        watched,
        hooks,
        kind,
    )
