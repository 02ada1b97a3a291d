"""What a recipe is: the studies of a paper's table or figure at two scales, and the facts of its protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from steppe.lab import spec
from steppe.lab.errors import LabError, unknown
from steppe.lab.runs import Plan
from steppe.lab.settings import Settings
from steppe.lab.sweep.space import Search, Stage, Value, applied, filled, holes

SCALES = ("paper", "laptop")


@dataclass(frozen=True)
class Study:
    """One comparison of a recipe, and the search before it. Methods may have holes, ``SAM(rho={rho})``."""

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

    def check(self) -> None:
        """Parse every method with the first value of each grid, so that a study that cannot run is refused early.

        Raises:
            LabError: a hole that nothing fills, or a method or setting that cannot be constructed.
        """
        first = {key: choices[0] for stage in self.stages for key, choices in stage.grid.items()}
        values = dict(self.values) | first | dict.fromkeys(self.timed, "1.0x")
        if unfilled := sorted({name for text in self.methods for name in holes(text)} - values.keys()):
            raise LabError(f"study {self.name!r} gives no value for {', '.join(unfilled)}")
        spec.parse_all([str(filled(text, values)) for text in self.methods], applied(self.settings, values))


@dataclass(frozen=True)
class Recipe:
    """A table or figure of a paper.

    Each fact is a topic and what the source says of it, "not transcribed" where it was not copied from there.
    """

    name: str
    question: str
    source: str
    facts: tuple[tuple[str, str], ...]
    paper: tuple[Study, ...]  # the whole protocol
    laptop: tuple[Study, ...]  # some minutes of two cores, on embedded data
    setting: str = ""  # what the published numbers were measured on
    measured: bool = False  # whether the minima are measured when the runs have finished

    def studies(self, scale: str) -> tuple[Study, ...]:
        """Return the studies at a scale."""
        if scale not in SCALES:
            raise unknown(f"unknown scale {scale!r}", scale, SCALES)
        return self.paper if scale == "paper" else self.laptop
