"""The record of a finished run: what the run was, what it cost, and how it learned."""

import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

import steppe

CURVES = ("epoch", "train_loss", "train_error", "test_error", "gap", "g_norm", "eps_norm", "cosine")


@dataclass(frozen=True)
class Record:
    """One finished run; rates are shares in [0, 1], passes are over whole batches.

    Raises:
        ValueError: values contradict each other.
    """

    method: str  # the canonical spec
    rule: str  # repr of the exact rule
    rho: float | None  # the optimizer's radius at the end, None without one
    base: str  # the base optimizer
    seed: int
    settings: dict[str, Any]
    epochs: int
    curves: dict[str, list[float | None]]  # one entry per evaluation; None if a value is missing or not finite
    test_error: float
    train_error: float | None  # None: not finite
    train_loss: float | None
    classes: int
    steps: int
    forwards: float
    backwards: float
    skipped: int  # steps that the optimizer left out because a gradient was not finite
    seconds: float  # of training alone, without evaluations
    collapsed: bool
    environment: dict[str, str]
    metric: str = "error %"  # what test_error and train_error are; a name that ends with % is of a share
    higher: bool = False  # whether a higher one is better

    def __post_init__(self) -> None:
        if self.steps < 1 or self.epochs < 1:
            raise ValueError("steps and epochs must be positive")
        if set(self.curves) != set(CURVES):
            raise ValueError(f"curves must be {', '.join(CURVES)}")
        if len({len(values) for values in self.curves.values()}) != 1 or self.curves["epoch"][-1:] != [self.epochs]:
            raise ValueError("curves must have equal lengths and end at the last epoch")

    @property
    def shown(self) -> float:
        """Return the test error as tables show it: shares in per cent."""
        return self.test_error * (100 if self.metric.endswith("%") else 1)

    @property
    def cost(self) -> float:
        """Return what a search makes small: the test error, or a metric that should be high with a minus."""
        return -self.shown if self.higher else self.shown

    @property
    def passes(self) -> float:
        """Return the number of gradient passes over the training set that the run has cost."""
        return self.backwards / (self.steps / self.epochs)


def told(metric: str, value: float) -> str:
    """Return a metric with its value for a line of text: shares in per cent, others as they are."""
    name = metric.removesuffix("%").rstrip()
    return f"{name} {100 * value:.4g} %" if metric.endswith("%") else f"{name} {value:.4g}"


@cache
def _commit() -> str:
    """Return the commit of a checkout that steppe is imported from, empty for an installed one."""
    root = Path(steppe.__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    with suppress(OSError):
        return f" at {subprocess.run(asked, capture_output=True, text=True).stdout.strip()}".removesuffix(" at ")
    return ""


def environment() -> dict[str, str]:
    """Return versions, machine and date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steppe": steppe.__version__ + _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
