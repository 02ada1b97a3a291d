"""From records to numbers: each method's mean and spread, its test against the baseline, every two methods compared."""

import math
from dataclasses import dataclass, field
from itertools import combinations

from steppe.lab.record import Record
from steppe.lab.runs import Context, Plan, Run
from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, holm, mean, paired, spread


@dataclass(frozen=True)
class Row:
    """The numbers of one method; errors that are shares are in per cent."""

    method: Method
    rule: str
    rho: float | None
    n: int
    mean: float
    sd: float
    baseline: bool
    paired: Paired | None  # against the baseline, over the seeds both have; None without any
    p: float  # Holm-corrected
    passes: float
    seconds: float
    collapsed: int
    paper: float | None = None  # the paper's error, on its own task


@dataclass(frozen=True)
class Pair:
    """Two methods compared over the seeds both have: ``method`` minus ``other``; ``p`` is Holm-corrected over all."""

    method: Method
    other: Method
    paired: Paired
    p: float


@dataclass(frozen=True)
class Summary:
    """Everything that a directory's records say."""

    plan: Plan
    records: dict[Run, Record]
    rows: list[Row]
    problems: list[str]
    context: Context = field(default_factory=Context)

    @property
    def metric(self) -> str:
        """Return the name of what the records measure."""
        return next((record.metric for record in self.records.values()), "error %")

    @property
    def higher(self) -> bool:
        """Return whether a higher metric is better."""
        return any(record.higher for record in self.records.values())

    @property
    def direction(self) -> str:
        """Return in words which metric is better."""
        return f"{'higher' if self.higher else 'lower'} is better"

    def of(self, method: Method) -> list[Record]:
        """Return a method's records in the order of their seeds."""
        return [record for run, record in self.records.items() if run.method == method]

    def errors(self, method: Method) -> dict[int, float]:
        """Return a method's errors by seed, in per cent where they are shares."""
        return {record.seed: record.shown for record in self.of(method)}


def summarise(plan: Plan, records: dict[Run, Record], problems: list[str], context: Context | None = None) -> Summary:
    """Compute the numbers of a plan's finished runs."""
    found = Summary(plan, records, [], problems, context or Context())
    present = [method for method in plan.methods if found.of(method)]
    tests = [None if method == plan.reference else _test(found, method, plan.reference) for method in present]
    for method, test, p in zip(present, tests, _corrected(tests), strict=True):
        found.rows.append(_row(found, method, test, p))
    return found


def pairs(found: Summary) -> list[Pair]:
    """Return the comparison of every two methods that share seeds."""
    couples = [(row.method, other.method) for row, other in combinations(found.rows, 2)]
    tests = [_test(found, *couple) for couple in couples]
    every = zip(couples, tests, _corrected(tests), strict=True)
    return [Pair(*couple, test, p) for couple, test, p in every if test is not None]


def _test(found: Summary, method: Method, other: Method) -> Paired | None:
    errors, others = found.errors(method), found.errors(other)
    seeds = sorted(errors.keys() & others.keys())
    return paired([errors[s] for s in seeds], [others[s] for s in seeds]) if seeds else None


def _corrected(tests: list[Paired | None]) -> list[float]:
    return holm([math.nan if test is None else test.p for test in tests])


def _row(found: Summary, method: Method, test: Paired | None, p: float) -> Row:
    records, errors = found.of(method), list(found.errors(method).values())
    return Row(
        method=method,
        rule=records[0].rule,
        rho=records[0].rho,
        n=len(records),
        mean=mean(errors),
        sd=spread(errors),
        baseline=method == found.plan.reference,
        paired=test,
        p=p,
        passes=mean([record.passes for record in records]),
        seconds=mean([record.seconds for record in records]),
        collapsed=sum(record.collapsed for record in records),
        paper=found.context.published.get(str(method)),
    )
