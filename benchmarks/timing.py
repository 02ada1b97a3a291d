"""Time contenders in interleaved rounds, each beside the same reference, in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch

SAMPLE = 0.05  # seconds that a sample lasts at least
FRESH = 0.5  # seconds after which the reference is timed again


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timer:
    """Timer of one step; ``seconds`` are its samples, by a clock of the wall or of the CPU (``process_time``)."""

    step: Callable[[], object]
    device: torch.device
    repeats: int = 1
    rounds: int = 1
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    clock: Callable[[], float] = perf_counter

    def after_itself(self) -> float:
        """Return the seconds of a step that follows a step of the same kind, so that no other warmed its memory."""
        self.step()
        return self.once()

    def once(self) -> float:
        """Return the seconds of a step, the mean of ``repeats``."""
        synchronize(self.device)
        start = self.clock()
        for _ in range(self.repeats):
            self.step()
        synchronize(self.device)
        return (self.clock() - start) / self.repeats

    def prepare(self, rounds: int, limit: float, sample: float = SAMPLE) -> None:
        """Warm up, and choose repeats and rounds such that all samples take about ``limit`` seconds at most."""
        self.step()
        seconds = self.once()
        self.repeats = max(1, min(200, round(sample / seconds)))
        self.rounds = max(1, min(rounds, int(limit / (seconds * self.repeats)) - 2))

    def row(self) -> dict[str, float | int]:
        """Return the medians of milliseconds and of the ratio to the reference, and the ratio's range."""
        return {
            "ms": round(1e3 * median(self.seconds), 4),
            "ratio": round(median(self.ratios), 4),
            "low": round(min(self.ratios), 4),
            "high": round(max(self.ratios), 4),
            "rounds": len(self.ratios),
        }


def interleave(reference: Timer, contenders: Sequence[Timer]) -> None:
    """Take samples, each beside a fresh one of the reference."""
    for i in range(max(t.rounds for t in (reference, *contenders))):
        beside, at = 0.0, float("-inf")
        for t in contenders:
            if i >= t.rounds:
                continue
            if perf_counter() - at > FRESH:
                beside, at = reference.after_itself(), perf_counter()
                reference.seconds.append(beside)
                reference.ratios.append(beside / median(reference.seconds))
            t.seconds.append(t.after_itself())
            t.ratios.append(t.seconds[-1] / beside)
