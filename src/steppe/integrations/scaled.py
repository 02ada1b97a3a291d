"""For frameworks that unscale gradients, check them and step by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from steppe.batch import Batch
from steppe.optimizer import SharpnessAware


def backward(
    optimizer: SharpnessAware, closure: Callable[[], Any] | Sequence[Batch], scaler: torch.amp.GradScaler | None
) -> Any:
    """``optimizer.backward``, with gradients that are scaled as after ``scaler.scale(loss).backward()``.

    ``scaler.unscale_(optimizer)``, ``scaler.step(optimizer)`` and ``scaler.update()`` follow as ever. The scale is a
    power of two unless the user chose another, so that scaling and unscaling lose nothing.
    """
    loss = optimizer.backward(closure, scaler=scaler)
    if scaler is not None:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = None if p.grad is None else scaler.scale(p.grad)
    return loss
