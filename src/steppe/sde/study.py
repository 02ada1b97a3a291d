"""A study of weak errors on a small problem: cases, measurement, fitted orders, and their figure (by matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.engine.oracle import AnyRule
from steppe.pieces.geometry import Unnormalised
from steppe.pieces.sample import OnFull
from steppe.rule import Micro, Plain, Rule
from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError, logistic, quadratic
from steppe.sde.paths import Errors, Progress, weak_error, whole_steps
from steppe.sde.scheme import Scheme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RULES: dict[str, Callable[[int], AnyRule]] = {
    "SGD": lambda m: Plain(),
    "n-USAM": lambda m: Rule(OnFull(), Unnormalised()),
    "USAM": lambda m: Rule(geometry=Unnormalised()),
    "m-USAM": lambda m: Micro(m, Rule(geometry=Unnormalised())),
    "n-SAM": lambda m: Rule(OnFull()),
    "SAM": lambda m: Rule(),
    "m-SAM": lambda m: Micro(m, Rule()),
}
COLORS = ("#000000", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7")  # of RULES, in their order
MARKS = "x^so^so"  # triangles for n-forms, squares for mini-batch forms, circles for m-forms
TITLES = {
    "lr": "equation without correction: order 1 in lr",
    "lr, corrected": "with the lr/2 correction: order 2 in lr",
    "rho": "beyond the error at rho 0: order 2 in rho",
}
PROBLEMS = ("logistic", "quadratic")
N = 6  # examples, in two dimensions
RESOLVED = 2.0  # standard errors that an error must exceed to enter a fit


@dataclass(frozen=True)
class GroupMean:
    """The mean of independent groups and its standard error."""

    mean: float
    error: float

    @property
    def resolved(self) -> bool:
        """Return True if the mean differs from zero by more than two standard errors."""
        return abs(self.mean) > RESOLVED * self.error


def estimate(groups: Sequence[float]) -> GroupMean:
    """Return mean and standard error of independent groups."""
    values = torch.tensor(groups, dtype=torch.float64)
    return GroupMean(float(values.mean()), float(values.std()) / math.sqrt(len(groups)))


@dataclass(frozen=True)
class Slope:
    """The exponent of ``error = C h^slope`` with its 95 % confidence interval, from ``points`` resolved errors."""

    slope: float
    low: float
    high: float
    points: int


def fit(h: Sequence[float], errors: Sequence[GroupMean]) -> Slope | None:
    """Return the weighted least squares fit of ``log abs(error)`` on ``log h``; ``None`` below two resolved errors.

    The interval carries the Monte Carlo error alone (delta method: ``log abs(error)`` has standard error ``error /
    abs(mean)``). It does not carry the curvature of the line by higher orders.
    """
    kept = [
        (math.log(a), math.log(abs(e.mean)), max(e.error / abs(e.mean), 1e-12) ** -2)  # the error is 0 without noise
        for a, e in zip(h, errors, strict=True)
        if e.resolved
    ]
    if len(kept) < 2:
        return None
    a, y, w = torch.tensor(kept, dtype=torch.float64).T
    centred = a - (w * a).sum() / w.sum()
    spread = float((w * centred**2).sum())
    slope = float((w * centred * y).sum()) / spread
    half = 1.96 / math.sqrt(spread)
    return Slope(slope, slope - half, slope + half, len(kept))


@dataclass(frozen=True)
class Case:
    """One weak error of a study, to be shown against lr or rho."""

    against: str
    rule: str
    corrected: bool
    lr: float
    rho: float

    @property
    def key(self) -> str:
        """Return the name of the case in a record."""
        kind = "corrected" if self.corrected else "plain"
        return f"{self.rule}, {kind}, lr {self.lr:g}, rho {self.rho:g}, against {self.against}"


@dataclass(frozen=True)
class ErrorStudy:
    """Weak errors on six examples in two dimensions, against lr and against rho."""

    problem: str = "logistic"  # or "quadratic"
    size: int = 2  # examples in a batch
    m: int = 1  # micro-batch of the m-forms
    time: float = 1.0  # length of the paths against lr
    paths: int = 4000  # of optimizer and equation
    seed: int = 0  # of batches and Brownian motion
    small_rho: float = 0.005  # radius against lr, whose square must be small beside the errors
    fixed_lr: float = 0.05  # learning rate against rho
    short_time: float = 0.4  # length against rho, where the loss bends most and its third derivatives show

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise SDEError(f"unknown problem {self.problem!r}; choose from {', '.join(PROBLEMS)}")

    def problem_and_start(self, against: str = "lr") -> tuple[FiniteSum, Tensor]:
        """Return the finite sum and the start of the paths."""
        draw = torch.Generator().manual_seed(0)
        X = 0.5 * torch.randn(N, 2, dtype=torch.float64, generator=draw)
        if self.problem == "logistic":
            y = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(N // 2)
            X = X + y[:, None] * torch.tensor([2.0, 1.0], dtype=torch.float64)
            start = (-1.0, 1.5) if against == "lr" else (-1.5, 1.0)
            return logistic(X, y, decay=0.2), torch.tensor(start, dtype=torch.float64)
        M = 0.2 * torch.randn(N, 2, 2, dtype=torch.float64, generator=draw)
        A = torch.diag(torch.tensor([2.0, 0.7], dtype=torch.float64)) + (M + M.mT) / 2
        return quadratic(A, X - X.mean(0)), torch.tensor([1.0, 1.5], dtype=torch.float64)

    def cases(self, rules: Sequence[str], lrs: Sequence[float], rhos: Sequence[float]) -> list[Case]:
        """Return every case: against lr without and with correction, and against rho with its start at 0.

        Mistakes are found before anything runs: ``ValueError`` is raised for a rule or a case that has no equation.
        """
        found = []
        for rule in rules:
            if rule not in RULES:
                raise SDEError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")
            small = 0.0 if rule == "SGD" else self.small_rho
            found += [Case("lr", rule, corrected, lr, small) for corrected in (False, True) for lr in lrs]
            if rule != "SGD":
                found += [Case("rho", rule, True, self.fixed_lr, rho) for rho in (0.0, *rhos)]
        for case in found:
            self.equation(case)
            whole_steps(self.time_of(case), case.lr)
        return list(dict.fromkeys(found))

    def time_of(self, case: Case) -> float:
        """Return the length of a case's paths."""
        return self.time if case.against == "lr" else self.short_time

    def equation(self, case: Case) -> Equation:
        """Return the equation that the optimizer is compared with."""
        scheme = Scheme(RULES[case.rule](self.m), case.lr, case.rho, self.size)
        return Equation(self.problem_and_start(case.against)[0], scheme, case.corrected)

    def measure(self, case: Case, progress: Progress) -> Errors:
        """Return the weak error of a case."""
        start = self.problem_and_start(case.against)[1]
        return weak_error(self.equation(case), start, self.time_of(case), self.paths, self.seed, progress)


@dataclass(frozen=True)
class ErrorCurve:
    """The errors of one rule against lr or rho, and their order."""

    rule: str
    function: str
    against: str  # "lr", "lr, corrected" or "rho"
    at: list[float]
    errors: list[GroupMean]
    order: Slope | None


def curves(errors: Mapping[str, Errors], cases: Sequence[Case]) -> Iterator[ErrorCurve]:
    """Yield the curves of the cases whose errors are measured, by :attr:`Case.key`.

    Against rho, errors are differences from that at rho 0, group by group.
    """
    done = [case for case in cases if case.key in errors]
    for rule in dict.fromkeys(case.rule for case in done):
        own = [case for case in done if case.rule == rule]
        for function in errors[own[0].key]:
            found = {case: errors[case.key][function] for case in own}
            for corrected, against in ((False, "lr"), (True, "lr, corrected")):
                by_lr = {c.lr: e for c, e in found.items() if (c.against, c.corrected) == ("lr", corrected)}
                yield _curve(rule, function, against, by_lr)
            by_rho = {c.rho: e for c, e in found.items() if c.against == "rho"}
            if base := by_rho.pop(0.0, None):
                beyond = {rho: [x - y for x, y in zip(e, base, strict=True)] for rho, e in by_rho.items()}
                yield _curve(rule, function, "rho", beyond)


def _curve(rule: str, function: str, against: str, groups: Mapping[float, list[float]]) -> ErrorCurve:
    at, errors = list(groups), [estimate(e) for e in groups.values()]
    return ErrorCurve(rule, function, against, at, errors, fit(at, errors))


def orders(curves: Sequence[ErrorCurve]) -> Figure:
    """Return the figure of weak errors against lr and rho, logarithmic.

    A dashed line has the claimed order. Hollow marks do not differ significantly from 0.
    """
    from matplotlib.figure import Figure

    functions = list(dict.fromkeys(curve.function for curve in curves))
    figure = Figure(figsize=(13, 3.6 * len(functions)), layout="constrained", dpi=110)
    axes = figure.subplots(len(functions), 3, squeeze=False)
    for row, function in zip(axes, functions, strict=True):
        for axis, (against, title) in zip(row, TITLES.items(), strict=True):
            shown = [curve for curve in curves if (curve.function, curve.against) == (function, against) and curve.at]
            _panel(axis, shown, 1 if against == "lr" else 2)
            axis.set(title=title, xlabel=against.split(",")[0], ylabel=f"weak error of {function}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _panel(axis: Axes, curves: Sequence[ErrorCurve], order: int) -> None:
    axis.set(xscale="log", yscale="log")
    styles = dict(zip(RULES, zip(COLORS, MARKS, strict=True), strict=True))
    resolved: list[tuple[float, float]] = []
    for curve in curves:
        color, mark = styles[curve.rule]
        sizes, bars = [abs(e.mean) for e in curve.errors], [1.96 * e.error for e in curve.errors]
        axis.errorbar(curve.at, sizes, bars, color=color, linewidth=1, capsize=2, alpha=0.6)
        axis.plot([], [], f"-{mark}", color=color, label=curve.rule)
        for h, size, e in zip(curve.at, sizes, curve.errors, strict=True):
            axis.plot(h, size, mark, color=color, markersize=6, markerfacecolor=color if e.resolved else "white")
            resolved += [(h, size)] if e.resolved else []
    if not resolved:
        return
    grid = sorted({h for curve in curves for h in curve.at})
    top, anchor = max(resolved)
    claimed = [1.6 * anchor * (h / top) ** order for h in grid]
    axis.plot(grid, claimed, "--", color="grey", linewidth=1, label="claimed order")
    axis.set_ylim(min(size for _, size in resolved) / 5, 5 * anchor)
    axis.set_xticks(grid, [f"{h:g}" for h in grid])
    axis.minorticks_off()
