"""The plans of the models seen so far."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from steppe.batch import Batch, leaves
from steppe.factored.rehearsal import Plan, rehearsed, tracked_of
from steppe.oracle import Oracle

log = logging.getLogger("steppe")

_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_for(f: Oracle, batch: Batch) -> Plan:
    """The plan of this model, data shape and choice of perturbed parameters, rehearsed at first sight."""
    plans = _plans.setdefault(batch.model, {})
    key = _key(f, batch)
    if key not in plans:
        plans[key] = rehearsed(f, batch)
        if plans[key].reason:
            log.info("micro-batches run one after the other: %s", plans[key].reason)
    return plans[key]


def forget(f: Oracle, batch: Batch, reason: str) -> None:
    """Remember that this model does not factor after all."""
    log.info("micro-batches run one after the other: %s", reason)
    plans = _plans.setdefault(batch.model, {})
    plans[_key(f, batch)] = Plan(tracked_of(f, batch), reason=reason)


def _key(f: Oracle, batch: Batch) -> Any:
    shapes = tuple((t.shape, t.dtype, t.device) for t in leaves(batch.data))
    perturbed = tuple(bool(r) and p.requires_grad for p, r in zip(f.point.parameters, f.rho.values, strict=True))
    modes = tuple(module.training for module in batch.model.modules())
    autocast = tuple(torch.is_autocast_enabled(d) for d in ("cpu", "cuda"))
    return (
        shapes,
        tuple(map(id, f.point.parameters)),
        perturbed,
        modes,
        autocast,
        id(getattr(batch.loss, "__code__", None)),
    )
