"""What every method takes, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from steppe.engine.ddp import Sync
from steppe.rule import Parts

Base = Optimizer | Sequence[Optimizer]


class Options(Parts, total=False):
    """The options of every method: see :class:`SharpnessAware`."""

    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str
    sync: Sync
    max_norm: float | None
    model: nn.Module | None
