"""The record of a finished run: what the run was, what it cost, and how it learned."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from steppe.lab.files import read_json, write_json

CURVES = ("epoch", "train_loss", "train_error", "test_error", "gap", "g_norm", "eps_norm", "cosine")


@dataclass(frozen=True)
class Record:
    """One finished run; rates are shares in [0, 1], passes are over whole batches.

    Raises:
        ValueError: a value has the wrong type, or values contradict each other.
    """

    method: str  # the canonical spec
    rule: str  # repr of the exact rule
    rho: float | None  # the optimizer's radius at the end, None without one
    base: str  # the base optimizer
    seed: int
    settings: dict[str, Any]
    epochs: int
    curves: dict[str, list[float | None]]  # one entry per evaluation; None if a value is missing or not finite
    test_error: float
    train_error: float
    train_loss: float | None
    classes: int
    steps: int
    forwards: float
    backwards: float
    skipped: int  # steps that the optimizer left out because a gradient was not finite
    seconds: float  # of training alone, without evaluations
    collapsed: bool
    environment: dict[str, str]

    def __post_init__(self) -> None:
        if wrong := [field.name for field in fields(self) if not _fits(getattr(self, field.name), field.type)]:
            raise ValueError(f"{', '.join(wrong)}: values of another type")
        if self.steps < 1 or self.epochs < 1:
            raise ValueError("steps and epochs must be positive")
        if set(self.curves) != set(CURVES):
            raise ValueError(f"curves must be {', '.join(CURVES)}")
        if len({len(values) for values in self.curves.values()}) != 1 or self.curves["epoch"][-1:] != [self.epochs]:
            raise ValueError("curves must have equal lengths and end at the last epoch")

    @property
    def passes(self) -> float:
        """Return the number of gradient passes over the training set that the run has cost."""
        return self.backwards / (self.steps / self.epochs)


def _fits(value: object, kind: Any) -> bool:
    kind = dict if get_origin(kind) is dict else kind
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def save(path: Path, record: Record) -> None:
    """Write the record of a finished run."""
    write_json(path, asdict(record))


def read(path: Path) -> Record:
    """Return the record in a file.

    Raises:
        ValueError: the file is damaged, or is no record.
        LabError: a newer steppe wrote it.
    """
    try:
        return Record(**read_json(path))
    except TypeError as error:
        raise ValueError(str(error).replace("Record.__init__() ", "")) from error
