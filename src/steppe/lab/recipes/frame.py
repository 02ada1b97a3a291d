"""What a recipe is: the studies of a paper's table or figure at a scale, and what is known of their protocol."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from steppe.lab import spec
from steppe.lab.runs import Plan
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Search, Stage, Value, applied, filled, holes

Scale = Literal["paper", "gpu-hour", "laptop"]
SCALES: tuple[Scale, ...] = get_args(Scale)


@dataclass(frozen=True)
class Study:
    """One comparison of a recipe, and the search before it. Methods may have holes, `SAM(rho={rho})`."""

    name: str
    settings: Settings
    methods: tuple[str, ...]
    seeds: int = 5
    values: Mapping[str, Value] = field(default_factory=dict)  # fill the holes that no stage searches
    stages: tuple[Stage, ...] = ()
    search_seeds: int = 1
    held_out: float = 0.1  # share of the training examples that the search validates on
    timed: Mapping[str, str] = field(default_factory=dict)  # hole of `epochs=` -> method: all take equal time
    published: Mapping[str, float] = field(default_factory=dict)  # the paper's test error in per cent, by method

    def search(self) -> Search:
        """Return the search, on a split of the training examples."""
        return Search(replace(self.settings, validation=self.held_out), self.stages, self.search_seeds, self.values)

    def plan(self, values: Mapping[str, Value]) -> Plan:
        """Return the comparison with its holes filled."""
        methods = tuple(dict.fromkeys(filled(text, values) for text in self.methods))
        return Plan(applied(self.settings, values), methods, self.seeds)

    def searched(self) -> list[str]:
        """Return the keys that stages search."""
        return [key for stage in self.stages for key in stage.grid]

    def runs(self) -> tuple[int, int]:
        """Return how many runs the search makes at most, and how many the comparison makes."""
        points = sum(len(stage.points()) for stage in self.stages)
        return points * self.search_seeds, len(self.methods) * self.seeds

    def paper(self, values: Mapping[str, Value]) -> dict[str, float | None]:
        """Return the paper's number for each method of the plan, None where it is not known."""
        return {str(filled(text, values)): self.published.get(text) for text in self.methods}


@dataclass(frozen=True)
class Recipe:
    """A study of a paper at three scales: the protocol whole, an hour of one GPU, some minutes of two cores.

    `facts` are pairs of a topic and what the sources say of it, "not known" where they say nothing.
    """

    name: str
    question: str
    source: str
    facts: tuple[tuple[str, str], ...]
    studies: Callable[[Scale], tuple[Study, ...]]
    setting: str = ""  # what the published numbers were measured on
    measured: bool = False  # whether the minima are measured once the runs have ended


def unfilled(study: Study) -> list[str]:
    """Return the holes that neither values, stages nor the timing fill."""
    known = {*study.values, *study.searched(), *study.timed}
    return sorted({name for text in study.methods for name in holes(text)} - known)


def names(study: Study) -> list[str]:
    """Return the methods as they are shown before a search: holes that have a value filled, the others in braces."""
    shown = dict(study.values) | {key: f"{{{key}}}" for key in (*study.searched(), *study.timed)}
    return [text.format(**shown) for text in study.methods]


def check(study: Study) -> None:
    """Parse every method with the first values of every grid, so that a recipe that cannot run is found unrun."""
    first = {key: choices[0] for stage in study.stages for key, choices in stage.grid.items()}
    values = dict(study.values) | first | dict.fromkeys(study.timed, "1.0x")
    spec.parse_all([str(filled(text, values)) for text in study.methods], applied(study.settings, values))
