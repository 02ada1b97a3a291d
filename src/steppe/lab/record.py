"""One finished run as one JSON file, written whole or not at all, and believed only after it has been checked."""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = 1
CURVES = ("epoch", "train_loss", "train_error", "test_error", "gap", "g_norm", "eps_norm", "cosine")


@dataclass(frozen=True)
class Record:
    """Everything a run leaves behind; rates are shares in [0, 1], passes are in whole batches."""

    method: str  # the canonical spec
    rule: str  # repr of the exact rule
    rho: float | None  # the optimizer's radius at the end, None without one
    base: str  # the base optimizer
    seed: int
    settings: dict[str, Any]
    epochs: int
    curves: dict[str, list[float | None]]  # one entry per evaluation; None where a value is missing or not finite
    test_error: float
    train_error: float
    train_loss: float | None
    classes: int
    steps: int
    forwards: float
    backwards: float
    skipped: int  # steps the optimizer left out because a gradient was not finite
    seconds: float  # training alone, evaluations excluded
    collapsed: bool
    environment: dict[str, str]

    @property
    def passes(self) -> float:
        """Return the gradient passes over the training set that the run has cost."""
        return self.backwards / (self.steps / self.epochs)


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is not a finite number (JSON has no NaN)."""
    return value if value is not None and math.isfinite(value) else None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write through a temporary file beside the target, so that the target is always whole: the old or the new."""
    write_text(path, json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clean(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("runs/.*.tmp")]:
        leftover.unlink(missing_ok=True)


def save(path: Path, record: Record) -> None:
    """Record a finished run."""
    write_json(path, asdict(record))


def read(path: Path) -> Record:
    """Return the record in a file; a `ValueError` says why a file is no record."""
    data = read_json(path)
    expected = {field.name: field.type for field in fields(Record)}
    if set(data) != set(expected):
        raise ValueError(f"fields {sorted(set(data) ^ set(expected))} are missing or unknown")
    record = Record(**data)
    _check(record)
    return record


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file that `write_json` wrote, less its format number."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a whole JSON file: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise ValueError(f"not a file of format {FORMAT}")
    return data


def _check(record: Record) -> None:
    """Refuse a record whose values contradict each other or have the wrong kind."""
    numbers = (record.test_error, record.train_error, record.forwards, record.backwards, record.seconds)
    counts = (record.seed, record.epochs, record.steps, record.skipped, record.classes)
    texts = (record.method, record.rule, record.base)
    if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in numbers):
        raise ValueError("errors, passes and seconds must be finite numbers")
    if not all(isinstance(value, int) and value >= 0 for value in counts) or not record.steps:
        raise ValueError("seed, epochs, steps, skipped and classes must be counts")
    if not all(isinstance(value, str) for value in texts) or not isinstance(record.settings, dict):
        raise ValueError("method, rule and base must be texts and settings an object")
    curves = record.curves
    if not isinstance(curves, dict) or set(curves) != set(CURVES):
        raise ValueError(f"curves must be {', '.join(CURVES)}")
    if len({len(values) for values in curves.values()}) != 1 or curves["epoch"][-1:] != [record.epochs]:
        raise ValueError("curves must have equal lengths and end at the last epoch")
