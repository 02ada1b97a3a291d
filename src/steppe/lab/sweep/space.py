"""Searches: stages of grids over settings and over the holes of a method's spec.

A hole is a name in braces: ``WSAM(rho={rho}, gamma={gamma})``. A grid's keys are holes, or fields of ``Settings``.
"""

import ast
import hashlib
import json
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product

from steppe.lab import spec
from steppe.lab.errors import LabError
from steppe.lab.settings import Settings

Value = float | int | str
Grid = Mapping[str, tuple[Value, ...]]
SETTINGS = tuple(f.name for f in fields(Settings) if f.name not in ("data", "data_dir", "validation"))


@dataclass(frozen=True)
class Stage:
    """One grid for one method; its best point fills holes and settings of the later stages."""

    name: str
    method: str
    grid: Grid

    def points(self) -> list[dict[str, Value]]:
        """Return every point of the grid; the last key varies fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


@dataclass(frozen=True)
class Search:
    """Stages in order; each point is trained with ``seeds`` seeds and tested on a validation split.

    ``values`` fills the holes that no stage searches.

    Example:
        >>> base = Stage("base", "SGD(epochs=2x)", {"lr": (0.05, 0.1), "weight_decay": (1e-4, 5e-4)})
        >>> radius = Stage("radius", "SAM(rho={rho})", {"rho": (0.05, 0.1, 0.2)})
        >>> Search(Settings(validation=0.1, test_seed=0), (base, radius), seeds=2)
    """

    settings: Settings
    stages: tuple[Stage, ...]
    seeds: int = 1
    values: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.settings.validation:
            raise LabError("a search needs a validation share; it never looks at the test set")
        if self.settings.data == "digits" and self.settings.test_seed is None:
            raise LabError("a search on digits needs a test-seed: one seed's validation examples are another's tests")

    def digest(self, stage: Stage, chosen: Mapping[str, Value]) -> str:
        """Return a hash of everything that a stage's values depend on; only the same search continues a study."""
        known = {key: chosen[key] for key in sorted(chosen)}
        facts = [self.settings.to_dict(), stage.method, asdict(stage)["grid"], known, self.seeds]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def holes(text: str) -> list[str]:
    """Return the names in braces of a method's spec."""
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


def filled(text: str, values: Mapping[str, Value]) -> spec.Method:
    """Return the method of a spec whose holes take ``values``."""
    if missing := [name for name in holes(text) if name not in values]:
        raise LabError(f"{text!r} needs a value for {', '.join(missing)}")
    return spec.parse(text.format(**{name: values[name] for name in holes(text)}))


def applied(settings: Settings, values: Mapping[str, Value]) -> Settings:
    """Return the settings with those of ``values`` that are settings."""
    return replace(settings, **{key: value for key, value in values.items() if key in SETTINGS})  # type: ignore[arg-type]


def parse(text: str) -> tuple[str, tuple[Value, ...]]:
    """Return key and values of a text such as ``rho=0.05,0.1,0.2``."""
    key, _, choices = text.partition("=")
    try:
        values = tuple(ast.literal_eval(choice.strip()) for choice in choices.split(","))
    except (ValueError, SyntaxError):
        values = ()
    if not key.strip() or not values or not all(isinstance(v, int | float) for v in values):
        raise LabError(f"cannot read space {text!r}; write it as KEY=VALUE,VALUE,... such as rho=0.05,0.1,0.2")
    if len(set(values)) < len(values):
        raise LabError(f"space {text!r} names a value twice")
    return key.strip(), values


def narrowed(stages: tuple[Stage, ...], spaces: Mapping[str, tuple[Value, ...]]) -> tuple[Stage, ...]:
    """Return the stages with other choices for some keys."""
    known = dict.fromkeys(key for stage in stages for key in stage.grid)
    if unknown := [key for key in spaces if key not in known]:
        raise LabError(f"space {unknown[0]!r} is not searched here; choose from {', '.join(known)}")
    return tuple(
        replace(stage, grid={key: spaces.get(key, choices) for key, choices in stage.grid.items()}) for stage in stages
    )


def check(search: Search) -> None:
    """Construct every point's method and settings, which refuses bad values before anything runs."""
    known: dict[str, Value] = dict(search.values)
    for stage in search.stages:
        for point in stage.points():
            settings = applied(search.settings, known | point)
            spec.parse_all([str(filled(stage.method, known | point))], settings)
        known |= stage.points()[0]
