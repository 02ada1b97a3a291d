"""What a comparison's runs ended in: one record of its minimum a run, and the table of them (WSAM's Table 9)."""

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe import measure
from steppe.lab import record, tasks, weights
from steppe.lab.directory import path_of
from steppe.lab.environment import environment
from steppe.lab.meter import SEEN
from steppe.lab.record import Record, finite
from steppe.lab.settings import LabError
from steppe.lab.train import Run
from steppe.measure import Minimum

BATCH = 500  # examples in one pass
PROBES = 2  # of the spectral density
STEPS = tuple(round(i / 20 - 1, 2) for i in range(41))  # of the slice, in units of the filter-normalised direction


@dataclass(frozen=True)
class Measured:
    """The minimum of one run, on its training set with the labels that it was trained on."""

    method: str
    seed: int
    settings: dict[str, Any]
    minimum: Minimum
    slice: dict[str, list[float | None]]  # the loss along a random filter-normalised direction, the same for each seed
    spectrum: dict[str, list[float]]  # the Hessian's: eigenvalue estimates and their shares, which add up to 1
    seconds: float
    environment: dict[str, str]


@dataclass(frozen=True)
class _Seen:
    """The training examples whose loss a run records, batch by batch."""

    task: tasks.Task

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for rows in torch.arange(min(len(self.task.labels), SEEN)).split(BATCH):
            yield self.task.inputs[rows], self.task.labels[rows]


def path(folder: Path, run: Run) -> Path:
    """Return where a run's minimum is recorded."""
    return folder / "minima" / path_of(folder, run).name


def measured(folder: Path, run: Run, ended: Record) -> Measured:
    """Measure a finished run at its final weights, and record it."""
    started = time.perf_counter()
    task = tasks.load(run.settings, run.seed)
    model = weights.load(folder, run, ended, task)
    criterion, data = nn.CrossEntropyLoss(reduction="none"), _Seen(task)
    found = measure.minimum(model, criterion, data, seed=run.seed)
    problem = measure.Problem(model, criterion, data)
    line = measure.line(problem, measure.filter_normalised(problem, seed=run.seed), STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", measure.NotConverged)  # of the ends, which the top eigenvalue tells
        density = measure.spectral_density(measure.Hessian(problem), PROBES, seed=run.seed)
    result = Measured(
        method=str(run.method),
        seed=run.seed,
        settings=run.settings.to_dict(),
        minimum=found,
        slice={"t": list(line.t), "loss": [finite(loss) for loss in line.loss]},
        spectrum={
            "node": torch.cat(density.nodes).tolist(),
            "share": (torch.cat(density.weights) / PROBES).tolist(),
        },
        seconds=time.perf_counter() - started,
        environment=environment(),
    )
    record.write_json(path(folder, run), asdict(result))
    return result


def read(folder: Path, run: Run) -> Measured | None:
    """Return a run's recorded minimum, or `None` where there is none; a `LabError` where it is damaged."""
    file = path(folder, run)
    if not file.exists():
        return None
    try:
        data = record.read_json(file)
        for kind, values in ((Measured, data), (Minimum, data.get("minimum", {}))):
            if set(values) != (expected := {field.name for field in fields(kind)}):
                raise ValueError(f"fields {sorted(set(values) ^ expected)} are missing or unknown")
        found = Measured(**data | {"minimum": Minimum(**data["minimum"])})
    except (ValueError, TypeError) as error:
        raise LabError(f"{file} is damaged: {error}. Delete it and measure again") from error
    if (found.method, found.seed, found.settings) != (str(run.method), run.seed, run.settings.to_dict()):
        raise LabError(f"{file} records another method, seed or settings. Delete it and measure again")
    return found


def measure_all(
    folder: Path, records: dict[Run, Record], done: Callable[[Run, Measured | Exception], None]
) -> list[tuple[Run, Exception]]:
    """Measure every finished run that has no record of its minimum yet; `done` hears of each; return what failed.

    A run that cannot be measured (collapsed to a loss that is not finite, no weights) does not stop the others. What
    is measured stays measured, also where this is interrupted.
    """
    torch.set_num_threads(1)  # one thread adds in one order
    failures: list[tuple[Run, Exception]] = []
    for run, ended in records.items():
        try:
            result: Measured | Exception = read(folder, run) or measured(folder, run, ended)
        except (LabError, ValueError, FloatingPointError) as error:
            failures.append((run, error))
            result = error
        done(run, result)
    return failures
