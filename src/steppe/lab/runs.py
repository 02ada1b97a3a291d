"""The one format of run directories: ``run``, ``compare``, ``sweep`` and ``reproduce`` write it, ``report`` reads it.

A directory holds methods times seeds under one :class:`~steppe.lab.settings.Settings`; ``steppe run`` makes one with a
single run. :func:`path_of` gives every path, ``docs/reference/files.md`` says what the files hold. A run is done when
its record is there. After ``sweep`` alone ``seeds`` in ``config.json`` is 0: any comparison may then use the directory.

A damaged record is named and its run is made again; a newer format is refused. Directories of ``compare`` and
``reproduce`` of 0.1 have this format.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steppe.lab import spec
from steppe.lab.errors import LabError
from steppe.lab.files import LOCK, clean, load, read_json, save, write, write_json
from steppe.lab.record import Record
from steppe.lab.settings import Settings
from steppe.lab.spec import Method

RECIPE, SEARCH, COMPARISON = "recipe.json", "search.json", "comparison.json"
_BEFORE = (RECIPE, SEARCH, COMPARISON, "search", "study.db")  # what a search leaves before its comparison begins
_SUFFIXES = {"runs": ".json", "weights": ".pt", "minima": ".json", "checkpoints": ".pt", "metrics": ".jsonl"}


@dataclass(frozen=True)
class Run:
    """One method under one seed."""

    method: Method
    seed: int
    settings: Settings

    @property
    def epochs(self) -> int:
        """Return the number of epochs that this run trains."""
        return self.method.epochs_of(self.settings.epochs)

    @property
    def name(self) -> str:
        """Return the run's file name, without a suffix."""
        return f"{self.method.slug}-s{self.seed}"

    def __str__(self) -> str:
        return f"{self.method} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Methods times ``seeds`` seeds, from ``first`` on, under one ``Settings``."""

    settings: Settings
    methods: tuple[Method, ...]
    seeds: int
    baseline: Method | None = None  # what the others are compared to; None is the first method
    first: int = 0

    @property
    def reference(self) -> Method:
        """Return the baseline.

        Raises:
            LabError: it is none of the methods.
        """
        if self.baseline is not None and self.baseline not in self.methods:
            raise LabError(f"baseline {self.baseline} is none of the methods: {', '.join(map(str, self.methods))}")
        return self.baseline or self.methods[0]

    def runs(self) -> list[Run]:
        """Return every run, seed by seed, so that runs that finish early are already paired."""
        seeds = range(self.first, self.first + self.seeds)
        return [Run(method, seed, method.under(self.settings)) for seed in seeds for method in self.methods]

    @classmethod
    def alone(cls, run: Run) -> "Plan":
        """Return the plan of a single run."""
        return cls(run.settings, (run.method,), 1, first=run.seed)


@dataclass(frozen=True)
class Context:
    """What a recipe leaves beside the runs: its protocol and its search; empty for other comparisons."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def published(self) -> Mapping[str, float | None]:
        """Return the paper's test error in per cent by method, ``None`` for numbers that are not known."""
        return self.recipe.get("published", {})  # type: ignore[no-any-return]


def path_of(folder: Path, run: Run, kind: str = "runs") -> Path:
    """Return the path of a run's record, or of its ``weights``, ``minima``, ``checkpoints`` or ``metrics``."""
    return folder / kind / (run.name + _SUFFIXES[kind])


def open_for(folder: Path, asked: Plan, single: bool = False) -> Plan:
    """Create or continue a directory; return the plan of everything that it holds then. See :func:`merged`."""
    plan = merged(folder, asked, single)
    data = {"settings": plan.settings.to_dict(), "methods": list(map(str, plan.methods)), "seeds": plan.seeds}
    write_json(folder / "config.json", data | {"first": plan.first, "baseline": str(plan.reference)})
    clean(folder)
    return plan


def merged(folder: Path, asked: Plan, single: bool = False) -> Plan:
    """Return what a directory holds and what is asked for as one plan; write nothing.

    With ``single`` the directory must hold exactly this plan; else methods and seeds may be added.

    Raises:
        LabError: the directory holds something else.
    """
    if not (folder / "config.json").exists():
        _refuse_others(folder)
        return asked
    old = read_plan(folder)
    if not old.seeds:
        return asked
    exact = single or bool(old.first or asked.first)
    before, now = _facts(old, exact), _facts(asked, exact)
    if changed := [f"{name} was {before[name]}, now {now[name]}" for name in now if before[name] != now[name]]:
        raise LabError(f"{folder} holds other runs: {'; '.join(changed)}. Choose another --out")
    methods = tuple(dict.fromkeys(old.methods + asked.methods))
    return Plan(asked.settings, methods, max(old.seeds, asked.seeds), asked.baseline or old.baseline, asked.first)


def _facts(plan: Plan, exact: bool) -> dict[str, object]:
    """Return the settings of a plan by name, with ``exact`` its methods and seeds too."""
    settings = {name.replace("_", "-"): value for name, value in plan.settings.to_dict().items()}
    if not exact:
        return settings
    seeds = ", ".join(map(str, range(plan.first, plan.first + plan.seeds)))
    return {"method": ", ".join(map(str, plan.methods)), "seed": seeds} | settings


def _refuse_others(folder: Path) -> None:
    """Raise a ``LabError`` for a folder that holds files of something else."""
    if folder.exists():
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
        if not all(name.startswith(_BEFORE) or name.endswith(".tmp") for name in names if name != LOCK):
            raise LabError(f"{folder} exists and holds no runs (no config.json). Choose another --out")


def read_plan(folder: Path) -> Plan:
    """Return the plan that a directory records.

    Raises:
        LabError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.exists():
        raise LabError(f"{folder} holds no runs (no config.json)")
    try:
        data = read_json(path)
        settings, methods = Settings(**data["settings"]), tuple(map(spec.parse, data["methods"]))
        return Plan(settings, methods, int(data["seeds"]), spec.parse(data["baseline"]), int(data.get("first", 0)))
    except (ValueError, TypeError, KeyError) as error:
        raise LabError(f"{path} is damaged: {error}") from error


def context(folder: Path) -> Context:
    """Return what a recipe left in a directory.

    Raises:
        LabError: a file is damaged.
    """
    found = []
    for path in (folder / RECIPE, folder / SEARCH):
        try:
            found.append(read_json(path) if path.exists() else {})
        except ValueError as error:
            raise LabError(f"{path} is damaged: {error}") from error
    return Context(*found)


def stages(folder: Path) -> list[dict[str, Any]]:
    """Return the stages of a directory's search, each with its name and the values that it chose.

    Raises:
        LabError: the file is damaged.
    """
    path = folder / SEARCH
    try:
        found = list(read_json(path)["stages"])
        for stage in found:
            dict(stage["chosen"]), str(stage["name"]), list(stage["points"])
        return found
    except (ValueError, TypeError, KeyError) as error:
        raise LabError(f"{path} is damaged ({error}); delete it to search again") from error


def best_first(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of a stage that ended, the best first; the first tried of equals is the first."""
    ended = (point for point in points if point["error"] is not None)
    return sorted(ended, key=lambda point: point.get("cost", point["error"]))  # older searches have no cost


def finished(folder: Path, plan: Plan) -> tuple[dict[Run, Record], list[str]]:
    """Return the plan's finished runs, and a line for every file that is no record of its run."""
    records, problems = {}, []
    for run in plan.runs():
        if (path := path_of(folder, run)).exists():
            try:
                records[run] = _matching(run, load(path, Record))
            except ValueError as error:
                problems.append(f"{path.name} is ignored: {error}")
    return records, problems


def _matching(run: Run, found: Record) -> Record:
    try:
        settings = Settings(**found.settings)  # settings that came after it was written stand at their defaults
    except (TypeError, LabError) as error:
        raise ValueError(f"its settings are damaged: {error}") from error
    if (found.method, found.seed, settings, found.epochs) != (str(run.method), run.seed, run.settings, run.epochs):
        raise ValueError("it records another method, seed or settings")
    return found


def finish(folder: Path, run: Run, record: Record, weights: Mapping[str, Any]) -> None:
    """Write a run's final ``state_dict``, then its record, which says that the run is finished."""
    on_cpu = {name: tensor.cpu() for name, tensor in weights.items()}
    write(path_of(folder, run, "weights"), partial(torch.save, on_cpu))
    save(path_of(folder, run), record)
