"""A study of weak errors on a small problem: its cases, their measurement, and the fitted orders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.engine.oracle import AnyRule
from steppe.pieces.geometry import Unnormalised
from steppe.pieces.sample import OnFull
from steppe.rule import Micro, Plain, Rule
from steppe.sde.compare import Errors, GroupMean, Progress, Slope, estimate, fit, weak_error, whole_steps
from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError, logistic, quadratic
from steppe.sde.scheme import Scheme

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
    """Weak errors on six examples in two dimensions, against lr and against rho.

    Args:
        problem: ``"logistic"`` or ``"quadratic"``.
        size: examples in a batch.
        m: micro-batch of the m-forms.
        time: length of the paths against lr.
        paths: paths of optimizer and equation.
        seed: seed of batches and Brownian motion.
        small_rho: radius against lr, whose square must be small beside the errors.
        fixed_lr: learning rate against rho.
        short_time: length of the paths against rho, where the loss bends most and its third derivatives show.

    Raises:
        SDEError: ``problem`` is unknown.
    """

    problem: str = "logistic"
    size: int = 2
    m: int = 1
    time: float = 1.0
    paths: int = 4000
    seed: int = 0
    small_rho: float = 0.005
    fixed_lr: float = 0.05
    short_time: float = 0.4

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

        Raises:
            SDEError: a rule is unknown, or a case has no equation.
            ValueError: a number is out of its range.
        """
        found = []
        for rule in rules:
            if rule not in RULES:
                raise SDEError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}")
            small = 0.0 if rule == "SGD" else self.small_rho
            found += [Case("lr", rule, corrected, lr, small) for corrected in (False, True) for lr in lrs]
            if rule != "SGD":
                found += [Case("rho", rule, True, self.fixed_lr, rho) for rho in (0.0, *rhos)]
        for case in found:  # all mistakes are found before anything runs
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
    """Yield the curves of the measured cases; against rho, errors are differences from that at rho 0, group by group.

    Args:
        errors: the measured errors, by :attr:`Case.key`.
        cases: the cases of a study.
    """
    done = [case for case in cases if case.key in errors]
    for rule in dict.fromkeys(case.rule for case in done):
        own = [case for case in done if case.rule == rule]
        for function in errors[own[0].key]:
            found = {case: errors[case.key][function] for case in own}
            for corrected, against in ((False, "lr"), (True, "lr, corrected")):
                points = [(c.lr, e) for c, e in found.items() if (c.against, c.corrected) == ("lr", corrected)]
                yield _curve(rule, function, against, points)
            by_rho = {case.rho: groups for case, groups in found.items() if case.against == "rho"}
            if (base := by_rho.pop(0.0, None)) is not None:
                beyond = [(rho, [x - y for x, y in zip(e, base, strict=True)]) for rho, e in by_rho.items()]
                yield _curve(rule, function, "rho", beyond)


def _curve(rule: str, function: str, against: str, points: list[tuple[float, list[float]]]) -> ErrorCurve:
    at, errors = [h for h, _ in points], [estimate(groups) for _, groups in points]
    return ErrorCurve(rule, function, against, at, errors, fit(at, errors))
