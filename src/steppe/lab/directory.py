"""A comparison's directory: `config.json` says what was asked for, `runs/` holds what is finished."""

from dataclasses import dataclass
from pathlib import Path

from steppe.lab import record, spec
from steppe.lab.record import Record
from steppe.lab.settings import LabError, Settings, differences
from steppe.lab.spec import Method
from steppe.lab.train import Run

_BEFORE = ("recipe.json", "search.json", "study.db")  # what a recipe's search leaves before its comparison begins


@dataclass(frozen=True)
class Plan:
    """Methods times seeds under one `Settings`."""

    settings: Settings
    methods: tuple[Method, ...]
    seeds: int
    baseline: Method | None = None  # what others are compared to; the first method where it is None

    @property
    def reference(self) -> Method:
        """Return the baseline, which must be one of the methods."""
        if self.baseline is not None and self.baseline not in self.methods:
            raise LabError(f"baseline {self.baseline} is none of the methods: {', '.join(map(str, self.methods))}")
        return self.baseline or self.methods[0]

    def runs(self) -> list[Run]:
        """Return every run, seed by seed, so that what is finished early is already paired."""
        return [Run(method, seed, self.settings) for seed in range(self.seeds) for method in self.methods]


def open_for(folder: Path, asked: Plan) -> Plan:
    """Create or continue a directory; return the plan of all it holds, which may be more than was asked now."""
    plan = asked
    if (folder / "config.json").exists():
        old = read_plan(folder)
        if changed := differences(old.settings, asked.settings):
            raise LabError(
                f"{folder} holds a comparison with other settings: {'; '.join(changed)}. Choose another --out"
            )
        methods = tuple(dict.fromkeys(old.methods + asked.methods))
        plan = Plan(asked.settings, methods, max(old.seeds, asked.seeds), asked.baseline or old.baseline)
    elif folder.exists() and not (folder.is_dir() and all(path.name.startswith(_BEFORE) for path in folder.iterdir())):
        raise LabError(f"{folder} exists and holds no comparison (no config.json). Choose another --out")
    data = {"settings": plan.settings.to_dict(), "methods": list(map(str, plan.methods)), "seeds": plan.seeds}
    record.write_json(folder / "config.json", data | {"baseline": str(plan.reference)})
    record.clean(folder)
    return plan


def read_plan(folder: Path) -> Plan:
    """Return the plan that a directory records."""
    path = folder / "config.json"
    if not path.exists():
        raise LabError(f"{folder} holds no comparison (no config.json)")
    try:
        data = record.read_json(path)
        settings = Settings(**data["settings"])
        methods = tuple(spec.parse(text) for text in data["methods"])
        return Plan(settings, methods, int(data["seeds"]), spec.parse(data["baseline"]))
    except (ValueError, TypeError, KeyError) as error:
        raise LabError(f"{path} is damaged: {error}") from error


def finished(folder: Path, plan: Plan) -> tuple[dict[Run, Record], list[str]]:
    """Return the plan's finished runs, and a line for every file that claims to be one and is not."""
    records, problems = {}, []
    for run in plan.runs():
        path = path_of(folder, run)
        if path.exists():
            try:
                records[run] = _matching(run, record.read(path))
            except ValueError as error:
                problems.append(f"{path.name} is ignored: {error}")
    return records, problems


def path_of(folder: Path, run: Run) -> Path:
    """Return where a run is recorded."""
    return folder / "runs" / f"{run.method.slug}-s{run.seed}.json"


def _matching(run: Run, found: Record) -> Record:
    wanted = (str(run.method), run.seed, run.settings, run.epochs)
    if (found.method, found.seed, settings_of(found), found.epochs) != wanted:
        raise ValueError("it records another method, seed or settings")
    return found


def settings_of(found: Record) -> Settings:
    """Return a record's settings; those that came after it was written stand at their defaults."""
    try:
        return Settings(**found.settings)
    except (TypeError, LabError) as error:
        raise ValueError(f"its settings are none: {error}") from error
