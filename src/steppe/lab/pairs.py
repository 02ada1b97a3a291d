"""Every two methods of a summary, compared."""

import math
from dataclasses import dataclass
from itertools import combinations

from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, holm
from steppe.lab.summary import Summary, against, errors_of


@dataclass(frozen=True)
class Pair:
    """Two methods compared over the seeds both have: `method` minus `other`; `p` is Holm-corrected over all pairs."""

    method: Method
    other: Method
    paired: Paired
    p: float


def pairs(summary: Summary) -> list[Pair]:
    """Compare every two methods that share seeds."""
    errors = errors_of(summary.plan, summary.records)
    couples = [(row.method, other.method) for row, other in combinations(summary.rows, 2)]
    tests = [against(errors[method], errors[other], same=False) for method, other in couples]
    adjusted = holm([math.nan if test is None else test.p for test in tests])
    found = zip(couples, tests, adjusted, strict=True)
    return [Pair(*couple, test, p) for couple, test, p in found if test is not None]
