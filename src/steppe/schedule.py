"""The radius over time. A schedule is a frozen value, ``(step, group) -> rho``, given as ``rho=`` in place of a number.

It is asked at every step with the number of steps before it and the parameter group, so it needs no state of its own:
the optimizer's checkpoint resumes it. Where it answers 0 for every group, the step is the base optimizer's own, in one
pass.

Example:
    >>> SAM(base, rho=Window(0.05, start=1_000))         # a plain start: large radii may collapse in the first steps
    >>> SAM(base, rho=Tail(0.05, steps=100_000))         # SAM in the last tenth of 100,000 steps only
    >>> SAM(base, rho=Periodic(0.05, every=5))           # every fifth step
    >>> GSAM(base, rho=ProportionalToLR(rho_max=0.6, rho_min=0.0, lr_max=3e-3, lr_min=3e-5), alpha=0.4)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from steppe.engine import checks

Group = Mapping[str, Any]  # a parameter group
Schedule = Callable[[int, Group], float]


@dataclass(frozen=True)
class Constant:
    """``rho`` always; what a plain number means.

    Args:
        rho: the radius, at least 0.

    Raises:
        ValueError: ``rho`` is negative.
    """

    rho: float

    def __post_init__(self) -> None:
        checks.non_negative("rho", self.rho)

    def __call__(self, step: int, group: Group) -> float:
        return self.rho


@dataclass(frozen=True)
class Linear:
    """From ``start`` at step 0 to ``end`` at step ``steps``, in a straight line; ``end`` from then on.

    Args:
        start, end: the radius at step 0 and from step ``steps`` on.
        steps: how many steps it takes.

    Raises:
        ValueError: a radius is negative, or ``steps`` is not positive.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_ramp(self.start, self.end, self.steps)

    def __call__(self, step: int, group: Group) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Cosine:
    """From ``start`` at step 0 to ``end`` at step ``steps``, along half a cosine; ``end`` from then on.

    Args:
        start, end: the radius at step 0 and from step ``steps`` on.
        steps: how many steps it takes.

    Raises:
        ValueError: a radius is negative, or ``steps`` is not positive.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_ramp(self.start, self.end, self.steps)

    def __call__(self, step: int, group: Group) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2


@dataclass(frozen=True)
class ProportionalToLR:
    """``rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)``: GSAM, algorithm 1 (arXiv 2203.08065).

    Follows each group's learning rate, so rho is small while the learning rate warms up from below ``lr_min`` too, but
    never below 0. Constant (``rho_max``) where ``lr_max == lr_min``.

    Args:
        rho_max, rho_min: the radius at ``lr_max`` and at ``lr_min``.
        lr_max, lr_min: the learning rates that they belong to.

    Raises:
        ValueError: a number is negative, or ``lr_min`` exceeds ``lr_max``.
    """

    rho_max: float
    rho_min: float
    lr_max: float
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rho_max", "rho_min", "lr_max", "lr_min"):
            checks.non_negative(name, getattr(self, name))
        if self.lr_min > self.lr_max:
            raise ValueError(f"lr_min must be at most lr_max, got {self.lr_min!r} > {self.lr_max!r}")

    def __call__(self, step: int, group: Group) -> float:
        if self.lr_max == self.lr_min:
            return self.rho_max
        share = (float(group["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
        return max(0.0, self.rho_min + (self.rho_max - self.rho_min) * share)


@dataclass(frozen=True)
class Window:
    """``rho``, a number or a schedule, in steps ``start <= step < stop`` and 0 outside: outside, one pass a step.

    Args:
        rho: the radius inside.
        start: the first step inside, counted from 0.
        stop: the first step after it; ``None`` never ends.

    Raises:
        ValueError: ``rho`` or ``start`` is negative, or ``stop`` comes before ``start``.
    """

    rho: float | Schedule
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        check_scheduled("rho", self.rho)
        checks.non_negative("start", self.start)
        if self.stop is not None and not self.stop >= self.start:
            raise ValueError(f"stop must be at least start ({self.start}), got {self.stop!r}")

    def __call__(self, step: int, group: Group) -> float:
        inside = step >= self.start and (self.stop is None or step < self.stop)
        return scheduled(self.rho, step, group) if inside else 0.0


@dataclass(frozen=True)
class Tail:
    """``rho``, a number or a schedule, in the last ``share`` of ``steps`` and 0 before: ``1 + share`` passes a step.

    SAM in the last few per cent of training finds nearly what SAM throughout finds, in the experiments of Zhou et al.
    2025 (arXiv 2410.10373). With a learning rate that stays constant and decays at the end, give the tail the decay's
    share. It goes on after ``steps``, should training be longer than planned.

    Args:
        rho: the radius in the tail.
        steps: how many steps are planned.
        share: of them, in (0, 1]: ``round(share * steps)`` steps, at least 1.

    Raises:
        ValueError: ``rho`` is negative, ``steps`` is no positive integer, ``share`` is not in (0, 1].

    Example:
        >>> optimizer = SAM(base, rho=Tail(0.05, steps=epochs * len(loader), share=0.1))
    """

    rho: float | Schedule
    steps: int
    share: float = 0.1

    def __post_init__(self) -> None:
        check_scheduled("rho", self.rho)
        checks.positive_integer("steps", self.steps)
        checks.positive_share("share", self.share)

    def __call__(self, step: int, group: Group) -> float:
        inside = step >= self.steps - max(1, round(self.share * self.steps))
        return scheduled(self.rho, step, group) if inside else 0.0


@dataclass(frozen=True)
class Periodic:
    """``rho``, a number or a schedule, at steps 0, every, 2 every, ... and 0 between: between, one pass a step.

    Args:
        rho: the radius at those steps.
        every: how many steps apart, at least 1.

    Raises:
        ValueError: ``rho`` is negative, or ``every`` is no positive integer.
    """

    rho: float | Schedule
    every: int

    def __post_init__(self) -> None:
        check_scheduled("rho", self.rho)
        checks.positive_integer("every", self.every)

    def __call__(self, step: int, group: Group) -> float:
        return 0.0 if step % self.every else scheduled(self.rho, step, group)


def _check_ramp(start: float, end: float, steps: int) -> None:
    checks.non_negative("start", start)
    checks.non_negative("end", end)
    checks.positive_integer("steps", steps)


def check_scheduled(name: str, value: float | Schedule) -> None:
    """Refuse a negative number; what a schedule answers is checked in :func:`scheduled`."""
    if not callable(value):
        checks.non_negative(name, value)


def scheduled(value: float | Schedule, step: int, group: Group, name: str = "rho") -> float:
    """Return a number, or what a schedule answers for a group at a step, checked; ``name`` is its argument's."""
    now = value(step, group) if callable(value) else value
    checks.non_negative(name, now)
    return float(now)
