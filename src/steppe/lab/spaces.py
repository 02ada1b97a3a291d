"""What a fair comparison searches of each method: one table by parameter, and the trials that cover it evenly."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.quasirandom import SobolEngine

from steppe.lab.sweep.space import Choices, Range, Value

# Searched wherever a method has the parameter and its spec does not set it; NAME.parameter is for one method alone.
# The learning rate, the radius and the epochs are ranges around the settings' and the method's own values.
SPACES: dict[str, Choices] = {
    "gamma": Range(0.5, 0.95, log=False),
    "lam": Range(0.1, 10.0),
    "UnifiedSAM.lam": Range(0.0, 1.0, log=False),
    "alpha": Range(0.01, 0.5),
    "LookSAM.alpha": Range(0.1, 1.0),
    "LookbehindSAM.alpha": Range(0.2, 1.0),
    "SANER.alpha": Range(0.1, 1.0),
    "GAM.alpha": Range(0.1, 3.0),
    "ReweightedSharpness.size": (8, 16, 32, 64),
    "LookSAM.k": Range(2, 10, whole=True),
    "sigma": Range(0.1, 1.0),
    "theta": Range(0.1, 0.95, log=False),
    "beta": Range(0.3, 1.0, log=False),
    "ESAM.gamma": Range(0.3, 1.0, log=False),
    "LateSAM.share": Range(0.05, 0.5),
}
# Searched where a spec asks for it by a hole: SAM(m={m}).
HOLES: dict[str, Choices] = {
    "m": (4, 8, 16, 32),
    "sampled": (1, 2, 4),
    "ascent": (4, 8, 16, 32),
    "clip": Range(0.25, 4.0),
    "weight_decay": Range(1e-5, 1e-2),
    "batch_size": (16, 32, 64, 128),
}
LR = 8.0  # times and divided by
RHO = (0.2, 20.0)  # times the method's own radius
SHORTEST = 0.1  # of the common number of epochs
NEAR = 0.125  # of a range, to both sides of the best trial, where more are drawn near it
_EDGE = 0.1  # of a range
_DIMENSIONS = 12  # of the sequence, so that two methods get the same learning rates and lengths


def space(name: str, key: str, default: Any, epochs: tuple[int, int]) -> Choices | None:
    """Return what is searched of a method's parameter, ``None`` for nothing; ``epochs`` is (common, most)."""
    if key == "lr":
        return Range(default / LR, default * LR)
    if key == "rho":
        return Range(RHO[0] * default, RHO[1] * default)
    if key == "epochs":
        return Range(max(1, round(SHORTEST * epochs[0])), epochs[1], whole=True)
    return SPACES.get(f"{name}.{key}", SPACES.get(key))


def capped(choices: Choices, most: int) -> Choices:
    """Return choices of epochs up to the most that a method may train; that number alone where all are above it."""
    if isinstance(choices, Range):
        return replace(choices, low=min(choices.low, most), high=min(choices.high, most))
    return tuple(each for each in choices if float(each) <= most) or (most,)


def design(
    spaces: Mapping[str, Choices], fixed: Mapping[str, Value], trials: int, draw: int = 0
) -> tuple[dict[str, Value], ...]:
    """Return the trials: the fixed setting if it lies in the spaces, then points of a scrambled Sobol sequence.

    They do not depend on results, so every machine, order and interruption gives the same trials.
    """
    shares = SobolEngine(_DIMENSIONS, scramble=True, seed=draw).draw(trials).tolist()
    points = [dict(fixed)] if all(_within(fixed[key], choices) for key, choices in spaces.items()) else []
    points += [{key: _at(spaces[key], share) for key, share in zip(spaces, row, strict=False)} for row in shares]
    return tuple(dict(pairs) for pairs in dict.fromkeys(tuple(point.items()) for point in points[:trials]))


def near(
    spaces: Mapping[str, Choices], best: Mapping[str, Value], trials: int, draw: int
) -> tuple[dict[str, Value], ...]:
    """Return further trials from the part of the spaces around the best one."""
    around = {key: _around(choices, best[key]) for key, choices in spaces.items()}
    return tuple(point for point in design(around, best, trials + 1, draw) if point != best)[:trials]


def _around(choices: Choices, value: Value) -> Choices:
    """Return a quarter of a range around a value; of a list, the value and its neighbours."""
    if isinstance(choices, Range):
        share = choices.share(float(value))
        low, high = (choices.at(min(1.0, max(0.0, share + side))) for side in (-NEAR, NEAR))
        return replace(choices, low=low, high=high)
    ordered = sorted(choices)
    place = ordered.index(value)
    return tuple(ordered[max(0, place - 1) : place + 2])


def _at(choices: Choices, share: float) -> Value:
    return (
        choices.at(share) if isinstance(choices, Range) else choices[min(int(share * len(choices)), len(choices) - 1)]
    )


def _within(value: Value, choices: Choices) -> bool:
    if isinstance(choices, Range):
        return isinstance(value, int | float) and choices.low <= value <= choices.high
    return value in choices


def edge(value: Value, choices: Choices) -> str:
    """Return ``low`` or ``high`` if a chosen value lies at an end of what was searched, else an empty text.

    An end is a tenth of a range, by orders of magnitude where it is searched so, or the first or last of more than two
    numbers. The best value may lie beyond it.
    """
    if isinstance(choices, Range):
        share = choices.share(float(value))
        return "low" if share < _EDGE else "high" if share > 1 - _EDGE else ""
    ordered = sorted(choices)
    ends = {ordered[0]: "low", ordered[-1]: "high"} if len(ordered) > 2 else {}
    return ends.get(value, "")
