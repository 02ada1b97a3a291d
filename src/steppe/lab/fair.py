"""A fair comparison: the same search for every method, then final seeds with what each search chose.

Every method gets the same number of trials over its learning rate, radius, own parameters and length, judged on
validation examples, and the same largest budget of passes, seconds or epochs for one run. Nothing that the test set
says is used for a choice. ``comparison.json`` holds the question, ``search.json`` the search, the directory itself the
final runs, and ``fixed/`` the same methods at fixed parameters, as an unfair comparison has them.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from steppe.lab import files, runs, spec
from steppe.lab.compare import FOREVER, Failure, compare
from steppe.lab.errors import LabError, PausedError, unknown
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.price import Price, prices
from steppe.lab.runs import COMPARISON, SEARCH, Plan
from steppe.lab.settings import Settings
from steppe.lab.spaces import HOLES, capped, design, near, space
from steppe.lab.spec import Method, base_of
from steppe.lab.sweep.space import Choices, Range, Search, Stage, Value, check, filled, holes, parse, shown
from steppe.lab.sweep.work import Worksite, search
from steppe.lab.terminal import Display, line

EQUAL = ("passes", "seconds", "epochs")
FIRST_SEED = 1000  # of the search; the final runs have the seeds from 0 on
FIXED = "fixed"  # the folder of the comparison at fixed parameters


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked to do; methods may have holes, ``SAM(m={m})``.

    Raises:
        LabError: ``equal`` is unknown.
    """

    settings: Settings
    methods: tuple[str, ...]
    seeds: int
    trials: int = 16
    search_seeds: int = 2
    validation: float = 0.25  # share of the training examples that the search holds out
    clean: bool = False  # whether their labels stay clean; else they are as noisy as the others
    equal: str = "passes"  # what the longest run of every method may cost alike: passes, seconds or epochs
    spaces: Mapping[str, Choices] = field(default_factory=dict)
    search_minutes: float | None = None  # of training in each method's search, after which it begins no trial
    near: int = 0  # of the trials, drawn near the best of the others
    draw: int = 0  # of the trials and of the seeds of the searches: what is left to luck

    def __post_init__(self) -> None:
        if self.search_minutes is not None and not self.search_minutes > 0:
            raise LabError(f"search-minutes must be a positive number, not {self.search_minutes}")
        if not 0 <= self.near < self.trials:
            raise LabError(f"near must be a number of trials below all {self.trials}, not {self.near}")
        if self.equal not in EQUAL:
            raise LabError(f"equal must be one of {', '.join(EQUAL)}, not {self.equal!r}")

    def facts(self) -> dict[str, Any]:
        """Return everything that must be the same when a comparison goes on; seeds may be added."""
        spaces = {key: shown(choices) for key, choices in self.spaces.items()}
        facts = vars(self) | {"settings": self.settings.to_dict(), "spaces": spaces, "methods": list(self.methods)}
        return {key: each for key, each in facts.items() if key != "seeds"}


@dataclass(frozen=True)
class Contestant:
    """A method as it was asked for, what is searched of it, and its setting without a search."""

    name: str
    method: str  # with a hole for everything that is searched
    space: Mapping[str, Choices]
    fixed: Mapping[str, Value]

    def stage(self, trials: int, draw: int = 0) -> Stage:
        """Return the method's search."""
        return Stage(self.name, self.method, {}, design(self.space, self.fixed, trials, draw))


def everyone(asked: Asked) -> dict[str, tuple[str, float]]:
    """Return every method by name, its spec and a factor of its epochs: the baselines, then those asked for."""
    base, batch = base_of(asked.settings), asked.settings.batch_size
    found = {base: (base, 1.0)}
    if asked.equal == "epochs":
        found[f"{base}, twice the epochs"] = (base, 2.0)
    if batch >= 8:
        small = f"{base}(batch_size={batch // 4})"
        found[small] = (small, 1.0)
    return found | {text: (text, 1.0) for text in asked.methods if text not in found}


def contestants(asked: Asked, costs: Mapping[str, Price]) -> tuple[Contestant, ...]:
    """Return who takes part, with the most epochs that ``costs``, by name, allow each.

    With equal passes or seconds a run may cost what twice the common epochs of the base cost, as a method of two passes
    does in the common number of epochs.
    """
    found = []
    for name, (text, factor) in everyone(asked).items():
        most = factor * asked.settings.epochs
        if asked.equal != "epochs":
            base, own = (getattr(costs[key], asked.equal) for key in (base_of(asked.settings), name))
            most = 2 * asked.settings.epochs * base / own
        found.append(_contestant(asked, name, text, max(1, round(most))))
    searched = {key for one in found for key in one.space}
    if strange := [key for key in asked.spaces if key not in searched]:
        raise unknown(f"space {strange[0]!r} is searched of no method here", strange[0], sorted(searched))
    return tuple(found)


def _contestant(asked: Asked, name: str, text: str, epochs: int) -> Contestant:
    given, wanted = _parsed(text, asked), holes(text)
    defaults: dict[str, Any] = {"lr": asked.settings.lr, "epochs": epochs} | spec.defaults_of(given.name)
    set_there = {*dict(given.options), *dict(given.settings), *(["epochs"] if given.epochs else [])} - {*wanted}
    set_there |= spec.excluded(given.name, dict(given.options))
    spaces: dict[str, Choices] = {}
    for key in dict.fromkeys([*defaults, *wanted]):
        usual = _hole(key, asked) if key in wanted else None
        usual = usual or space(given.name, key, defaults.get(key), (asked.settings.epochs, epochs))
        chosen_itself = key in defaults and defaults[key] is None and key not in wanted
        if usual is not None and key not in set_there and not chosen_itself:
            spaces[key] = asked.spaces.get(key, usual)
            spaces[key] = capped(spaces[key], epochs) if key == "epochs" else spaces[key]
    fixed = {key: _middle(choices) if key in wanted else defaults[key] for key, choices in spaces.items()}
    added = ", ".join(f"{key}={{{key}}}" for key in spaces if key not in wanted)
    if added:
        text = f"{text.rstrip()[:-1]}, {added})" if text.rstrip().endswith(")") else f"{text}({added})"
    return Contestant(name, text, spaces, fixed)


def _hole(key: str, asked: Asked) -> Choices | None:
    """Return what a hole is searched over: micro-batches are parts of the batch."""
    choices = asked.spaces.get(key, HOLES.get(key))
    if key in ("m", "ascent") and key not in asked.spaces and isinstance(choices, tuple):
        return tuple(m for m in choices if float(m) < asked.settings.batch_size) or (1,)
    return choices


def _parsed(text: str, asked: Asked) -> Method:
    """Return the method of a text with some value in every hole."""
    values = {}
    for key in holes(text):
        choices = _hole(key, asked) or (Range(0.05, 0.05) if key in ("lr", "rho") else None)
        if f"{key}={{{key}}}" not in text or choices is None:
            raise LabError(f"cannot search {{{key}}} of {text!r}; write key={{key}}, and its --space if there is none")
        values[key] = _middle(choices)
    return filled(text, values)


def _middle(choices: Choices) -> Value:
    return choices.at(0.5) if isinstance(choices, Range) else choices[len(choices) // 2]


@dataclass(frozen=True)
class Comparison:
    """What was asked, and who takes part."""

    asked: Asked
    contestants: tuple[Contestant, ...]

    def search(self) -> Search:
        """Return the search of all methods: the trials that cover the spaces."""
        trials = self.asked.trials - self.asked.near
        return self._search(tuple(one.stage(trials, self.asked.draw) for one in self.contestants), trials)

    def nearer(self, searched: list[dict[str, Any]]) -> Search:
        """Return the search near the best trials of the first."""
        trials, stages = self.asked.near, []
        for one, stage in zip(self.contestants, searched, strict=True):
            points = near(one.space, stage["chosen"], trials, self.asked.draw)
            stages.append(Stage(f"{one.name}, near", one.method, {}, points))
        return self._search(tuple(stages), trials)

    def _search(self, stages: tuple[Stage, ...], trials: int) -> Search:
        held = {"validation": self.asked.validation, "clean_validation": self.asked.clean}
        settings = replace(self.asked.settings, **held)  # type: ignore[arg-type]
        minutes = math.inf if self.asked.search_minutes is None else self.asked.search_minutes
        limit = 60 * minutes * trials / self.asked.trials
        first = FIRST_SEED + self.asked.draw * self.asked.search_seeds
        return Search(settings, stages, self.asked.search_seeds, first=first, chained=False, limit=limit)

    def plan(self, values: Mapping[str, Mapping[str, Value]]) -> Plan:
        """Return the final runs with the values of each method, by its name."""
        methods = tuple(dict.fromkeys(filled(one.method, values[one.name]) for one in self.contestants))
        return Plan(self.asked.settings, methods, self.asked.seeds)

    def fixed(self) -> Plan:
        """Return the comparison at fixed parameters."""
        return self.plan({one.name: one.fixed for one in self.contestants})


def opened(folder: Path, asked: Asked, hardware: Hardware = CPU) -> Comparison:
    """Create or continue a comparison in a directory; prices are measured once and kept.

    Raises:
        LabError: the directory holds another comparison, or the question cannot be trained.
    """
    methods = {name: _parsed(text, asked) for name, (text, _) in everyone(asked).items()}
    spec.parse_all(list(map(str, methods.values())), asked.settings)  # before the question whether it is the same
    if (before := opened_again(folder)) is not None:
        old, now = before.asked.facts(), asked.facts()
        if changed := [f"{key} was {old[key]}, now {now[key]}" for key in now if old[key] != now[key]]:
            raise LabError(f"{folder} holds another comparison: {'; '.join(changed)}. Choose another --out")
        return Comparison(asked, before.contestants)
    alike = dict.fromkeys(methods, Price(1.0, 1.0))
    check(Comparison(asked, contestants(asked, alike)).search())  # mistakes are told before anything is measured
    costs = prices(asked.settings, methods, hardware)
    found = Comparison(asked, contestants(asked, costs))
    kept = {"asked": asked.facts() | {"seeds": asked.seeds}}
    files.write_json(folder / COMPARISON, kept | {"prices": {name: asdict(each) for name, each in costs.items()}})
    return found


def opened_again(folder: Path) -> Comparison | None:
    """Return the comparison of a directory, ``None`` if it holds none.

    Raises:
        LabError: its file is damaged.
    """
    path = folder / COMPARISON
    if not path.exists():
        return None
    try:
        data = files.read_json(path)
        asked = data["asked"]
        spaces = dict(parse(f"{key}={text}") for key, text in asked["spaces"].items())
        settings, methods = Settings(**asked["settings"]), tuple(asked["methods"])
        again = Asked(**asked | {"settings": settings, "methods": methods, "spaces": spaces})
        return Comparison(again, contestants(again, {name: Price(**each) for name, each in data["prices"].items()}))
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{path} is damaged: {error}") from error


def run(
    folder: Path,
    asked: Asked,
    workers: int = 1,
    hardware: Hardware = CPU,
    console: Console | None = None,
    until: float = FOREVER,
    storage: str | None = None,
) -> list[Failure]:
    """Search, train the final seeds, and train the comparison at fixed parameters; return the runs that failed.

    The same call continues. Machines that share ``storage`` share the search; each trains its own final runs.

    Raises:
        LabError: the directory holds something else, or a trial failed.
        PausedError: it is later than ``until``, a time of ``time.time()``.
    """
    console = console or Console()
    if hardware.device == "cpu":
        torch.set_num_threads(1)
    with files.hold(folder):
        asks = opened(folder, asked, hardware)
        if not (folder / SEARCH).exists():
            url, name = storage or f"sqlite:///{(folder / 'study.db').resolve()}", f"compare/{asked.settings.data}"
            site = Worksite(url, name, folder / "search", hardware, until)
            _search(folder, asks, site, workers, console)
        chosen = {stage["name"]: stage["chosen"] for stage in runs.stages(folder)}
    if time.time() > until:
        raise PausedError
    failures = compare(folder, asks.plan(chosen), workers, hardware, console, until)
    return failures + compare(folder / FIXED, asks.fixed(), workers, hardware, console, until)


def _search(folder: Path, asks: Comparison, site: Worksite, workers: int, console: Console) -> None:
    wanted = asks.search()
    every = sum(len(stage.points()) + asks.asked.near for stage in wanted.stages)
    about = f"{len(asks.contestants)} methods, {asks.asked.trials} trials each, {wanted.seeds} seeds a trial"
    line(console, f"search: {about}; {100 * wanted.settings.validation:.3g} % of the training examples held out")
    with Display(console, "search", every) as display:

        def tell(text: str, done: int) -> None:
            display.update(done if done >= 0 else None, note=f"{done}/{every}" if done >= 0 else None)
            display.line(text, always=done < 0)

        _, stages = search(wanted, site, workers, tell)
        if asks.asked.near:
            ended = sum(len(stage["points"]) for stage in stages)
            nearer = asks.nearer(stages)
            _, further = search(nearer, site, workers, lambda text, done: tell(text, done + ended * (done >= 0)))
            stages = [_joined(*pair) for pair in zip(stages, further, strict=True)]
    files.write_json(folder / SEARCH, {"stages": stages, "seeds": wanted.seeds})


def _joined(stage: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    """Return a method's search with the trials near its best one."""
    points = stage["points"] + further["points"]
    return stage | {"points": points, "chosen": runs.best_first(points)[0]["values"]}
