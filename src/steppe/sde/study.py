"""The study that `steppe sde` runs: which problem, which rules, which errors; kept as it goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from steppe.engine.oracle import AnyRule
from steppe.pieces.geometry import Unnormalised
from steppe.pieces.sample import OnFull
from steppe.rule import Micro, Plain, Rule
from steppe.sde.compare import Errors, Estimate, Slope, estimate, fit, weak_error, whole_steps
from steppe.sde.equation import Equation
from steppe.sde.problem import Problem, SDEError, logistic, quadratic
from steppe.sde.scheme import Scheme
from steppe.sde.simulate import Progress

RULES: dict[str, Callable[[int], AnyRule]] = {
    "SGD": lambda m: Plain(),
    "n-USAM": lambda m: Rule(OnFull(), Unnormalised()),
    "USAM": lambda m: Rule(geometry=Unnormalised()),
    "m-USAM": lambda m: Micro(m, Rule(geometry=Unnormalised())),
    "n-SAM": lambda m: Rule(OnFull()),
    "SAM": lambda m: Rule(),
    "m-SAM": lambda m: Micro(m, Rule()),
}
PROBLEMS = ("logistic", "quadratic")
N = 6  # examples, in two dimensions


@dataclass(frozen=True)
class Settings:
    """What every error of a study shares."""

    problem: str = "logistic"
    size: int = 2
    m: int = 1  # of the m-forms
    time: float = 1.0  # of the errors against lr
    paths: int = 4000
    seed: int = 0
    small_rho: float = 0.005  # of the errors against lr: its square must not show beside theirs
    fixed_lr: float = 0.05  # of the errors against rho
    short_time: float = 0.4  # of those too, where the loss bends most: there its third derivatives show

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS:
            raise SDEError(f"unknown problem {self.problem!r}; choose from {', '.join(PROBLEMS)}")


@dataclass(frozen=True)
class Run:
    """One weak error, to be shown against lr or rho."""

    against: str
    rule: str
    corrected: bool
    lr: float
    rho: float

    @property
    def key(self) -> str:
        """Its name in the record."""
        kind = "corrected" if self.corrected else "plain"
        return f"{self.rule}, {kind}, lr {self.lr:g}, rho {self.rho:g}, against {self.against}"


def built(settings: Settings, against: str = "lr") -> tuple[Problem, Tensor]:
    """A problem of six examples in two dimensions, and where paths begin."""
    draw = torch.Generator().manual_seed(0)
    X = 0.5 * torch.randn(N, 2, dtype=torch.float64, generator=draw)
    if settings.problem == "logistic":
        y = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(N // 2)
        X = X + y[:, None] * torch.tensor([2.0, 1.0], dtype=torch.float64)
        start = (-1.0, 1.5) if against == "lr" else (-1.5, 1.0)
        return logistic(X, y, decay=0.2), torch.tensor(start, dtype=torch.float64)
    M = 0.2 * torch.randn(N, 2, 2, dtype=torch.float64, generator=draw)
    A = torch.diag(torch.tensor([2.0, 0.7], dtype=torch.float64)) + (M + M.mT) / 2
    return quadratic(A, X - X.mean(0)), torch.tensor([1.0, 1.5], dtype=torch.float64)


def runs(settings: Settings, rules: list[str], lrs: list[float], rhos: list[float]) -> list[Run]:
    """Every weak error: against lr, plain and corrected, and against rho with its start at 0.

    Raises:
        SDEError: a rule is unknown, or any run asks for what has no equation.
        ValueError: a number is out of its range.
    """
    for rule in rules:
        if rule not in RULES:
            raise SDEError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")
    found = []
    for rule in rules:
        small = 0.0 if rule == "SGD" else settings.small_rho
        found += [Run("lr", rule, corrected, lr, small) for corrected in (False, True) for lr in lrs]
        if rule != "SGD":
            found += [Run("rho", rule, True, settings.fixed_lr, rho) for rho in (0.0, *rhos)]
    for run in found:  # mistakes are told before anything runs
        equation_of(settings, run)
        whole_steps(time_of(settings, run), run.lr)
    return list(dict.fromkeys(found))


def time_of(settings: Settings, run: Run) -> float:
    """How long a run's paths are."""
    return settings.time if run.against == "lr" else settings.short_time


def equation_of(settings: Settings, run: Run) -> Equation:
    """The equation that a run compares the optimizer with."""
    scheme = Scheme(RULES[run.rule](settings.m), run.lr, run.rho, settings.size)
    return Equation(built(settings, run.against)[0], scheme, run.corrected)


def measure(settings: Settings, run: Run, progress: Progress) -> Errors:
    """The weak error of one run."""
    _, start = built(settings, run.against)
    time = time_of(settings, run)
    return weak_error(equation_of(settings, run), start, time, settings.paths, settings.seed, progress)


class Store:
    """Errors that are done, in one file that is always whole.

    Raises:
        SDEError: the file holds a study with other settings, or is damaged.
    """

    def __init__(self, file: Path, settings: Settings) -> None:
        self.file, self.settings, self.errors = file, settings, dict[str, Errors]()
        if file.exists():
            try:
                kept = json.loads(file.read_text())
                other, self.errors = kept["settings"], kept["errors"]
            except (ValueError, KeyError, TypeError) as error:
                raise SDEError(f"{file} is damaged: {error}. Remove it, or choose another --out") from None
            if other != asdict(settings):
                raise SDEError(f"{file} holds a study with other settings: {other}. Choose another --out")

    def missing(self, asked: list[Run]) -> list[Run]:
        """The runs that are not done."""
        return [run for run in asked if run.key not in self.errors]

    def keep(self, run: Run, errors: Errors) -> None:
        """Add one run."""
        self.errors[run.key] = errors
        text = json.dumps({"settings": asdict(self.settings), "errors": self.errors}, indent=1)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        os.replace(temporary, self.file)


@dataclass(frozen=True)
class Line:
    """Errors of one rule against lr or rho, and their order."""

    rule: str
    function: str
    against: str  # "lr", "lr, corrected" or "rho"
    at: list[float]
    errors: list[Estimate]
    order: Slope | None


def lines(store: Store, asked: list[Run]) -> Iterator[Line]:
    """What the finished runs say; against rho it is the error beyond that at rho 0, group by group."""
    done = [run for run in asked if run.key in store.errors]
    for rule in dict.fromkeys(run.rule for run in done):
        own = [run for run in done if run.rule == rule]
        for function in store.errors[own[0].key]:
            found = {run: store.errors[run.key][function] for run in own}
            for corrected, against in ((False, "lr"), (True, "lr, corrected")):
                points = [(r.lr, e) for r, e in found.items() if (r.against, r.corrected) == ("lr", corrected)]
                yield _line(rule, function, against, points)
            by_rho = {run.rho: errors for run, errors in found.items() if run.against == "rho"}
            if 0.0 in by_rho:
                base = by_rho.pop(0.0)
                yield _line(rule, function, "rho", [(rho, _minus(errors, base)) for rho, errors in by_rho.items()])


def _line(rule: str, function: str, against: str, points: list[tuple[float, list[float]]]) -> Line:
    at, errors = [h for h, _ in points], [estimate(groups) for _, groups in points]
    return Line(rule, function, against, at, errors, fit(at, errors))


def _minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]
