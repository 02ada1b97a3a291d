"""A study of weak errors on a small problem: cases, measurement, fitted orders."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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
CLAIMS = {"lr": 1, "lr, corrected": 2, "rho": 2}  # by axis, the order in lr or rho; rho beyond the error at rho 0
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
    """One weak error of a study; ``against`` (a key of ``CLAIMS``) is the axis on which it is shown."""

    against: str
    rule: str
    lr: float
    rho: float

    @property
    def corrected(self) -> bool:
        """Return whether the equation has its correction."""
        return self.against != "lr"

    @property
    def at(self) -> float:
        """Return the case's place on its axis."""
        return self.rho if self.against == "rho" else self.lr

    @property
    def key(self) -> str:
        """Return the name of the case in a record."""
        kind, axis = "corrected" if self.corrected else "plain", self.against.split(",")[0]
        return f"{self.rule}, {kind}, lr {self.lr:g}, rho {self.rho:g}, against {axis}"


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
            start = (-1.5, 1.0) if against == "rho" else (-1.0, 1.5)
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
            found += [Case(against, rule, lr, small) for against in ("lr", "lr, corrected") for lr in lrs]
            if rule != "SGD":
                found += [Case("rho", rule, self.fixed_lr, rho) for rho in (0.0, *rhos)]
        for case in found:
            self.equation(case)
            whole_steps(self.time_of(case), case.lr)
        return list(dict.fromkeys(found))

    def time_of(self, case: Case) -> float:
        """Return the length of a case's paths."""
        return self.short_time if case.against == "rho" else self.time

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
    """The errors of one rule on one axis, by test function, and their order."""

    rule: str
    function: str
    against: str
    at: list[float]
    errors: list[GroupMean]
    order: Slope | None


def curves(errors: Mapping[str, Errors], cases: Sequence[Case]) -> Iterator[ErrorCurve]:
    """Yield the curves of the cases whose errors are measured, by :attr:`Case.key`.

    Against rho, errors are differences from that at rho 0, group by group.
    """
    done = [case for case in cases if case.key in errors]
    functions = list(errors[done[0].key]) if done else []
    for rule, function, against in product(dict.fromkeys(case.rule for case in done), functions, CLAIMS):
        own = [case for case in done if (case.rule, case.against) == (rule, against)]
        groups = {case.at: errors[case.key][function] for case in own}
        if against == "rho":
            base = groups.pop(0.0, [])  # the first that is measured
            groups = {rho: [x - y for x, y in zip(e, base, strict=True)] for rho, e in groups.items()}
        if groups:
            found = [estimate(each) for each in groups.values()]
            yield ErrorCurve(rule, function, against, list(groups), found, fit(list(groups), found))


def orders(curves: Sequence[ErrorCurve]) -> "Figure":
    """Return the figure of weak errors against lr and rho, logarithmic, by matplotlib.

    A dashed line has the claimed order. Hollow marks do not differ significantly from 0.
    """
    from matplotlib.figure import Figure

    functions = list(dict.fromkeys(curve.function for curve in curves))
    figure = Figure(figsize=(13, 3.6 * len(functions)), layout="constrained", dpi=110)
    axes = figure.subplots(len(functions), len(CLAIMS), squeeze=False)
    for axis, (function, against) in zip(axes.flat, product(functions, CLAIMS), strict=True):
        axis.set(xscale="log", yscale="log", title=f"against {against}", ylabel=f"weak error of {function}")
        for curve in (curve for curve in curves if (curve.function, curve.against) == (function, against)):
            color = f"C{list(RULES).index(curve.rule)}"
            for h, e in zip(curve.at, curve.errors, strict=True):
                fill, bar = color if e.resolved else "white", 1.96 * e.error
                axis.errorbar(h, abs(e.mean), bar, fmt="o", color=color, markerfacecolor=fill, label=curve.rule)
            top = max(curve.at)
            claimed = [abs(curve.errors[curve.at.index(top)].mean) * (h / top) ** CLAIMS[against] for h in curve.at]
            axis.plot(curve.at, claimed, "--", color=color, linewidth=0.8)
    labels = {name: mark for axis in axes.flat for mark, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=len(RULES))
    return figure
