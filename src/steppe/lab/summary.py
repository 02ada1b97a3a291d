"""From records to numbers: each method's mean and spread, its test against the baseline, every two methods compared."""

import math
from dataclasses import dataclass, field
from itertools import combinations

from steppe.lab.record import Record
from steppe.lab.runs import Context, Plan, Run
from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, corrected, mean, over_seeds, spread


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
    errors = {method: found.errors(method) for method in present}
    base = errors.get(plan.reference, {})
    tests = [None if method == plan.reference else over_seeds(errors[method], base) for method in present]
    for method, test in zip(present, corrected(tests), strict=True):
        found.rows.append(_row(found, method, *(test or (None, math.nan))))
    return found


def pairs(found: Summary) -> list[Pair]:
    """Return the comparison of every two methods that share seeds."""
    couples = [(row.method, other.method) for row, other in combinations(found.rows, 2)]
    tests = corrected([over_seeds(*map(found.errors, couple)) for couple in couples])
    return [Pair(*couple, *test) for couple, test in zip(couples, tests, strict=True) if test is not None]


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
