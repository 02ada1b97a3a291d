"""Paired comparisons over seeds, and their correction for multiple comparisons."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ROUNDING = 1e-12  # of a value: what may be left of equal numbers after a subtraction


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences with its confidence interval and the paired t-test's two-sided p-value."""

    n: int
    difference: float
    low: float
    high: float
    p: float


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample (n - 1), NaN for one value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    found = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
    return 0.0 if found <= ROUNDING * abs(centre) else found


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Return the comparison of two samples paired by index; p is NaN if the differences have no spread."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    n, difference, sd = len(differences), mean(differences), spread(differences)
    rounding = ROUNDING * max(map(abs, [*values, *baseline]))
    difference, sd = (0.0 if abs(number) <= rounding else number for number in (difference, sd))
    if n < 2:
        return Paired(n, difference, math.nan, math.nan, math.nan)
    if sd == 0:
        return Paired(n, difference, difference, difference, math.nan)
    from scipy.stats import t

    error = sd / math.sqrt(n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(difference) / error, n - 1))
    return Paired(n, difference, difference - half, difference + half, p)


def over_seeds(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """Return the comparison over the seeds that both have, ``None`` without any."""
    seeds = sorted(values.keys() & baseline.keys())
    return paired([values[seed] for seed in seeds], [baseline[seed] for seed in seeds]) if seeds else None


def corrected(tests: Sequence[Paired | None]) -> list[tuple[Paired, float] | None]:
    """Return each test with its p-value Holm-corrected over all of them."""
    ps = holm([math.nan if test is None else test.p for test in tests])
    return [None if test is None else (test, p) for test, p in zip(tests, ps, strict=True)]


def holm(ps: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's step-down adjustment; a NaN stays NaN and does not count as a comparison."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, running = list(ps), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = running
    return adjusted
