"""The plans of the models seen so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from steppe.batch import Batch, leaves
from steppe.factored.rehearsal import Plan, has_hooks, rehearsed, tracked_of
from steppe.factored.tape import CannotFactor
from steppe.oracle import Oracle
from steppe.replay import RandomState, capturing

log = logging.getLogger("steppe")


@dataclass
class _Entry:
    plan: Plan
    uses: int = 0

    def due(self) -> bool:
        """Whether to rehearse again: data may change what a model does, so at times; where a batch told too little."""
        if not self.plan.final:
            return self.uses < 3
        return not self.plan.reason and (self.uses in (1, 10, 100) or self.uses % 1000 == 0)


_entries: WeakKeyDictionary[nn.Module, dict[Any, _Entry]] = WeakKeyDictionary()


def plan_for(f: Oracle, batch: Batch) -> Plan:
    """The plan of this model, data shape and choice of perturbed parameters; rehearsed at first sight and at times."""
    entries = _entries.setdefault(batch.model, {})
    key = _key(f, batch)
    entry = entries.get(key)
    captured = capturing(f.point.devices)
    if entry is None and captured:
        raise RuntimeError("take this step once before it is captured in a CUDA graph: its model is to be rehearsed")
    if entry is None or (entry.due() and not captured):
        plan = rehearsed(f, batch)
        if entry is not None and not entry.plan.reason and not plan.final:
            plan = entry.plan  # this batch tells nothing new
        if plan.reason and (entry is None or entry.plan.reason != plan.reason):
            log.info("micro-batches run one after the other: %s", plan.reason)
        entry = entries[key] = _Entry(plan, entry.uses if entry else 0)
    entry.uses += 1
    return entry.plan


def forget(f: Oracle, batch: Batch, reason: str) -> None:
    """Remember that this model does not factor after all."""
    log.info("micro-batches run one after the other: %s", reason)
    entries = _entries.setdefault(batch.model, {})
    entries[_key(f, batch)] = _Entry(Plan(tracked_of(f, batch), reason=reason))


def fall_back(f: Oracle, batch: Batch, error: Exception, before: RandomState) -> str:
    """After an error in the shared passes: serial from now on, from the same random numbers. Why, in a line.

    Raises:
        Exception: ``error`` itself, where it is the model's own and ``parallel=True`` leaves no serial loop to meet it.
    """
    if isinstance(error, CannotFactor):
        reason = str(error)
    elif f.parallel is True:
        raise error
    else:
        reason = f"{type(error).__name__}: {error}"
    forget(f, batch, reason)
    before.restore()
    return reason


def refusal(reason: str) -> ValueError:
    """What ``parallel=True`` gets for a model that does not factor."""
    return ValueError(f"parallel must be 'auto' or False for this model: {reason}")


def _key(f: Oracle, batch: Batch) -> Any:
    shapes = tuple((t.shape, t.dtype, t.device) for t in leaves(batch.data))
    hooks = any(has_hooks(p) for p in f.point.parameters)
    modes = tuple(module.training for module in batch.model.modules())
    autocast = tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda"))
    loss = getattr(batch.loss, "criterion", batch.loss)
    kind = getattr(loss, "__code__", type(loss))
    scaled = batch.scaler is not None and batch.scaler.is_enabled()
    return shapes, tuple(map(id, f.point.parameters)), tuple(f.point.movable), modes, autocast, hooks, kind, scaled
