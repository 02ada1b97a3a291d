"""Searches: stages of grids over settings and over the holes of a method's spec.

A hole is a name in braces: ``WSAM(rho={rho}, gamma={gamma})``. A grid's keys are holes, or fields of ``Settings``.
"""

import ast
import hashlib
import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from steppe.lab import spec
from steppe.lab.errors import LabError, unknown
from steppe.lab.settings import Settings

Value = float | int | str


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``: by orders of magnitude with ``log``, integers with ``whole``."""

    low: float
    high: float
    log: bool = True
    whole: bool = False

    def at(self, share: float) -> float | int:
        """Return the number at a share of the way from low to high, with three digits."""
        low, high = self.low, self.high
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return round(value) if self.whole else float(f"{value:.3g}")

    def share(self, value: float) -> float:
        """Return how far from low to high a number lies, from 0 to 1."""
        if self.high <= self.low:
            return 0.5
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


Choices = tuple[Value, ...] | Range
Grid = Mapping[str, tuple[Value, ...]]
SETTINGS = tuple(
    f.name for f in fields(Settings) if f.name not in ("data", "data_dir", "validation", "clean_validation")
)


@dataclass(frozen=True)
class Stage:
    """One grid for one method; its best point fills holes and settings of the later stages.

    With ``design`` its points are these, and the grid is empty.
    """

    name: str
    method: str
    grid: Grid
    design: tuple[Mapping[str, Value], ...] = ()

    def points(self) -> list[dict[str, Value]]:
        """Return every point of the grid; the last key varies fastest."""
        if self.design:
            return [dict(point) for point in self.design]
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Search:
    """Stages in order; each point is trained with ``seeds`` seeds and tested on a validation split.

    ``values`` fills the holes that no stage searches. The seeds are those from ``first`` on. Stages that are not
    ``chained`` know nothing of each other, and all points are trained with all seeds.

    Example:
        >>> base = Stage("base", "SGD(epochs=2x)", {"lr": (0.05, 0.1), "weight_decay": (1e-4, 5e-4)})
        >>> radius = Stage("radius", "SAM(rho={rho})", {"rho": (0.05, 0.1, 0.2)})
        >>> Search(Settings(validation=0.1, test_seed=0), (base, radius), seeds=2)
    """

    settings: Settings
    stages: tuple[Stage, ...]
    seeds: int = 1
    values: Mapping[str, Value] = field(default_factory=dict)
    first: int = 0
    chained: bool = True
    limit: float = math.inf  # seconds of training of a stage, after which none of its points is begun

    def __post_init__(self) -> None:
        if not self.settings.validation:
            raise LabError("a search needs a validation share; it never looks at the test set")
        if self.settings.data == "digits" and self.settings.test_seed is None:
            raise LabError("a search on digits needs a test-seed: one seed's validation examples are another's tests")

    def digest(self, stage: Stage, chosen: Mapping[str, Value]) -> str:
        """Return a hash of everything that a stage's values depend on; only the same search continues a study."""
        known = {key: chosen[key] for key in sorted(chosen)}
        tried = stage.points() if stage.design else stage.grid
        facts = [self.settings.to_dict(), stage.method, tried, known, self.seeds]
        facts += [self.first] if self.first else []
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def holes(text: str) -> list[str]:
    """Return the names in braces of a method's spec.

    Raises:
        LabError: a brace without its other.
    """
    try:
        return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise LabError(f"cannot read method {text!r} ({error}); write a value to search as in SAM(m={{m}})") from error


def filled(text: str, values: Mapping[str, Value]) -> spec.Method:
    """Return the method of a spec whose holes take ``values``."""
    if missing := [name for name in holes(text) if name not in values]:
        raise LabError(f"{text!r} needs a value for {', '.join(missing)}")
    return spec.parse(text.format(**{name: values[name] for name in holes(text)}))


def applied(settings: Settings, values: Mapping[str, Value]) -> Settings:
    """Return the settings with those of ``values`` that are settings."""
    return replace(settings, **{key: value for key, value in values.items() if key in SETTINGS})  # type: ignore[arg-type]


def parse(text: str) -> tuple[str, Choices]:
    """Return key and values of a text such as ``rho=0.05,0.1,0.2`` or, for a range, ``rho=0.01..1``."""
    key, _, choices = text.partition("=")
    ends = choices.split("..")
    try:
        values = tuple(ast.literal_eval(choice.strip()) for choice in (ends if len(ends) == 2 else choices.split(",")))
    except (ValueError, SyntaxError):
        values = ()
    if not key.strip() or not values or not all(isinstance(v, int | float) for v in values):
        raise LabError(
            f"cannot read space {text!r}; write it as KEY=VALUE,VALUE,... such as rho=0.05,0.1,0.2, or KEY=LOW..HIGH"
        )
    if len(set(values)) < len(values):
        raise LabError(f"space {text!r} names a value twice")
    if len(ends) == 2:
        low, high = values
        if low > high:
            raise LabError(f"space {text!r} must go from low to high")
        return key.strip(), Range(low, high, log=low > 0, whole=isinstance(low, int) and isinstance(high, int))
    return key.strip(), values


def shown(choices: Choices) -> str:
    """Return the text that :func:`parse` reads after the ``=``."""
    if isinstance(choices, Range):
        return f"{choices.low!r}..{choices.high!r}"
    return ",".join(map(repr, choices))


def narrowed(stages: tuple[Stage, ...], spaces: Mapping[str, Choices]) -> tuple[Stage, ...]:
    """Return the stages with other choices for some keys."""
    if ranges := [key for key, choices in spaces.items() if isinstance(choices, Range)]:
        raise LabError(f"a grid needs values for {', '.join(ranges)}, not a range")
    listed: dict[str, Any] = dict(spaces)
    known = dict.fromkeys(key for stage in stages for key in stage.grid)
    if strange := [key for key in spaces if key not in known]:
        raise unknown(f"space {strange[0]!r} is not searched here", strange[0], known)
    return tuple(
        replace(stage, grid={key: listed.get(key, choices) for key, choices in stage.grid.items()}) for stage in stages
    )


def check(search: Search) -> None:
    """Construct every point's method and settings, which refuses bad values before anything runs."""
    known: dict[str, Value] = dict(search.values)
    for stage in search.stages:
        for point in stage.points():
            settings = applied(search.settings, known | point)
            spec.parse_all([str(filled(stage.method, known | point))], settings)
        known |= stage.points()[0]
