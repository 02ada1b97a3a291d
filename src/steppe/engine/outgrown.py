"""Whether the correction of sampled micro-batches has outgrown ``g`` while the loss rose: told once."""

from collections import deque
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from steppe.engine.checks import warn
from steppe.engine.guess import EVERY
from steppe.engine.oracle import Oracle
from steppe.engine.replay import capturing
from steppe.telemetry import Telemetry

READINGS = 10  # in a row
RISE = 0.03  # of the first loss, which is about three times what trial runs that went well had


@dataclass
class Outgrown:
    """What it takes to tell: losses, and lengths of the correction in units of ``norm(g)``.

    A long correction alone is no sign: where a network fits its data, ``g`` vanishes and the ratio grows without end.
    So it is told where the ratio was above 1 on average over ``READINGS`` readings, and the mean loss of these is above
    the lowest mean of as many before, by ``RISE`` of the first step's loss. After a rise of the learning rate it begins
    anew. A run that is resumed is not judged: its first loss is not known.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=2 * READINGS))
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=READINGS))
    first: Tensor | float | None = None  # the loss at the first step
    lowest: float = inf  # mean of READINGS losses, before the last READINGS
    lr: float = inf
    told: bool = False

    def see(self, f: Oracle, seen: Telemetry) -> None:
        """Read every ``EVERY``-th step, which waits for the device, and for the ranks, which all say the same."""
        if self.told or seen.was_skipped or capturing(f.passes.parameters.devices):
            return
        if not seen.steps:
            self.first = seen.loss
        if self.first is None or (seen.steps + 1) % EVERY:
            return
        first, loss, ratio = mean_over_ranks(f, self.first, seen.loss, seen.correction_mean)
        self.read(first, loss, ratio, float(f.group.get("lr", 0.0)))

    def read(self, first: float, loss: float, ratio: float, lr: float) -> None:
        """Take one reading, and warn where this and those before tell it."""
        if lr > self.lr:
            self.losses.clear()
            self.lowest = inf
        self.lr = lr
        self.losses.append(loss)
        self.ratios.append(ratio)
        if len(self.losses) < 2 * READINGS:
            return
        before, now = (sum(part) / READINGS for part in (list(self.losses)[:READINGS], list(self.losses)[READINGS:]))
        self.lowest, mean_ratio = min(self.lowest, before), sum(self.ratios) / READINGS
        if not (mean_ratio > 1 and now - self.lowest > RISE * abs(first)):
            return
        self.told = True
        warn(
            f"over the last {EVERY * READINGS} steps the correction of sampled= was on average {mean_ratio:.2g} times "
            f"as long as the batch's gradient, and the loss, {now:.3g}, is above the {self.lowest:.3g} of before. The "
            "noise of the correction may be the cause: try clip=0.5, a larger m, or a smaller rho or learning rate"
        )


def mean_over_ranks(f: Oracle, *numbers: Tensor | float | None) -> list[float]:
    """Return the means of numbers over all ranks; ``None`` is 0."""
    passes = f.passes
    device = passes.parameters.device
    mine = [torch.as_tensor(0.0 if x is None else x, dtype=torch.float32, device=device) for x in numbers]
    mean = passes.ranks.mean_number(passes.ranks.shared_mean(torch.stack(mine), passes.parameters.sharded))
    return mean.tolist()  # type: ignore[union-attr]
