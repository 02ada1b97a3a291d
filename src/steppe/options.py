"""What every method takes, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import nn
from torch.optim import Optimizer

from steppe.engine.ddp import Sync

Base = Optimizer | Sequence[Optimizer]


class Parts(TypedDict, total=False):
    """The options of every method that choose the examples of a perturbation: see :class:`SharpnessAware`."""

    m: int | None
    sampled: int | None
    ascent: int | None
    clip: float | None


class Options(Parts, total=False):
    """The options of every method: see :class:`SharpnessAware`."""

    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str
    sync: Sync
    max_norm: float | None
    model: nn.Module | None
