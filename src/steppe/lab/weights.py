"""Final weights of finished runs: one file a run, written whole before its record is."""

import io
import os
from pathlib import Path

import torch
from torch import nn

from steppe.lab import models, tasks
from steppe.lab.directory import path_of
from steppe.lab.meter import SEEN
from steppe.lab.record import Record
from steppe.lab.settings import LabError
from steppe.lab.train import Run, evaluate

RTOL = 1e-3  # another machine may sum in another order


def of(folder: Path, run: Run) -> Path:
    """Return where a run's final weights are kept."""
    return folder / "weights" / f"{path_of(folder, run).stem}.pt"


def keep(folder: Path, run: Run, model: nn.Module) -> None:
    """Write a model's `state_dict` through a temporary file, so that the target is always whole."""
    buffer, path = io.BytesIO(), of(folder, run)
    torch.save({name: t.cpu() for name, t in model.state_dict().items()}, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(folder: Path, run: Run, record: Record, task: tasks.Task) -> nn.Module:
    """Return a finished run's model; its training loss must be the one that the run recorded."""
    path = of(folder, run)
    if not path.exists():
        raise LabError(
            f"{path} is missing: the run was made before weights were kept. "
            f"Delete {path_of(folder, run)} and run the same `steppe compare` again"
        )
    model = models.build(run.settings.model, task.inputs[0], task.classes)
    model.load_state_dict(torch.load(path, weights_only=True))
    loss, _ = evaluate(model, task.inputs, task.labels[:SEEN])
    if record.train_loss is None or abs(loss - record.train_loss) > RTOL * max(abs(record.train_loss), RTOL):
        raise LabError(f"{path} does not belong to its record: training loss {loss:.6g}, recorded {record.train_loss}")
    return model
