"""The minima that runs ended in, measured at their final weights and recorded beside them (WSAM's Table 9)."""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe import measure
from steppe.lab import files, tasks
from steppe.lab.errors import LabError
from steppe.lab.files import finite
from steppe.lab.metrics import SEEN, evaluate
from steppe.lab.record import Record, environment
from steppe.lab.runs import Run, path_of
from steppe.lab.train import built
from steppe.measure import Minimum

BATCH = 500  # examples in one pass
PROBES = 2  # of the spectral density
RTOL = 1e-3  # of the training loss: another machine may sum in another order
STEPS = tuple(round(i / 20 - 1, 2) for i in range(41))  # of the slice, in units of the filter-normalised direction


@dataclass(frozen=True)
class Measured:
    """The minimum of one run, on its training examples with the labels that it was trained on."""

    method: str
    seed: int
    settings: dict[str, Any]
    minimum: Minimum
    slice: dict[str, list[float | None]]  # loss along a random filter-normalised direction, the same for each seed
    spectrum: dict[str, list[float]]  # the Hessian's: eigenvalue estimates and their shares, which add up to 1
    seconds: float
    environment: dict[str, str]


@dataclass(frozen=True)
class _Seen:
    """The training examples whose loss a run records, in batches that are made when they are needed."""

    task: tasks.Task

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for rows in torch.arange(min(len(self.task.labels), SEEN)).split(BATCH):
            yield self.task.inputs[rows], self.task.labels[rows]


def trained(folder: Path, run: Run, ended: Record, task: tasks.Task) -> nn.Module:
    """Return a finished run's model.

    Raises:
        LabError: its loss is not finite, its weights are missing, or their training loss is not the recorded one.
    """
    if ended.train_loss is None:
        raise LabError("its training loss is not finite: there is no minimum to measure")
    path = path_of(folder, run, "weights")
    if not path.exists():
        raise LabError(
            f"{path} is missing: the run was made before weights were kept. "
            f"Delete {path_of(folder, run)} and run the same command again"
        )
    model = built(run, task)
    model.load_state_dict(torch.load(path, weights_only=True))
    loss, _ = evaluate(model, task.inputs, task.labels[:SEEN], own=task.own)
    if not abs(loss - ended.train_loss) <= RTOL * max(abs(ended.train_loss), RTOL):
        raise LabError(f"{path} does not belong to its record: training loss {loss:.6g}, recorded {ended.train_loss}")
    return model


def measured(folder: Path, run: Run, ended: Record) -> Measured:
    """Measure a finished run at its final weights, and record it."""
    started = time.perf_counter()
    task = tasks.load(run.settings, run.seed)
    model = trained(folder, run, ended, task)
    criterion = task.own.loss if task.own and task.own.loss else nn.CrossEntropyLoss(reduction="none")
    data = _Seen(task)
    found = measure.minimum(model, criterion, data, seed=run.seed)
    problem = measure.Problem(model, criterion, data)
    line = measure.line(problem, measure.filter_normalised(problem, seed=run.seed), STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", measure.NotConverged)  # of the ends, for which the top eigenvalue is measured
        density = measure.spectral_density(measure.Hessian(problem), PROBES, seed=run.seed)
    result = Measured(
        method=str(run.method),
        seed=run.seed,
        settings=run.settings.to_dict(),
        minimum=found,
        slice={"t": list(line.t), "loss": [finite(loss) for loss in line.loss]},
        spectrum={"node": torch.cat(density.nodes).tolist(), "share": (torch.cat(density.weights) / PROBES).tolist()},
        seconds=time.perf_counter() - started,
        environment=environment(),
    )
    files.save(path_of(folder, run, "minima"), result)
    return result


def read(folder: Path, run: Run) -> Measured | None:
    """Return a run's recorded minimum, ``None`` if it has not been measured.

    Raises:
        LabError: the file is damaged, or belongs to another run.
    """
    file = path_of(folder, run, "minima")
    if not file.exists():
        return None
    try:
        found = files.load(file, Measured)
    except ValueError as error:
        raise LabError(f"{file} is damaged: {error}. Delete it and measure again") from error
    settings = found.settings | {"data_dir": None}  # which was recorded once
    if (found.method, found.seed, settings) != (str(run.method), run.seed, run.settings.to_dict()):
        raise LabError(f"{file} records another method, seed or settings. Delete it and measure again")
    return found


def measure_all(
    folder: Path, records: dict[Run, Record], data_dir: Path | None = None
) -> Iterator[tuple[Run, Measured | Exception]]:
    """Yield the minimum of every finished run, measured unless it is recorded; or why a run cannot be measured.

    A run that cannot be measured (a loss that is not finite, no weights) does not stop the others. Every minimum is
    recorded before it is yielded. ``data_dir`` is the folder of the data on this machine.
    """
    torch.set_num_threads(1)  # one thread adds in one order
    for run, ended in records.items():
        here = replace(run, settings=replace(run.settings, data_dir=None if data_dir is None else str(data_dir)))
        try:
            yield run, read(folder, run) or measured(folder, here, ended)
        except (LabError, ValueError, FloatingPointError) as error:
            yield run, error
