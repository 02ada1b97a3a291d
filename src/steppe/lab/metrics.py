"""The numbers of a run in training: passes, telemetry and learning curves, and the file that they are appended to."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.errors import LabError
from steppe.lab.files import finite, write, writing
from steppe.lab.hardware import ALONE, Process
from steppe.lab.own import OwnTask, losses, metrics
from steppe.lab.record import CURVES
from steppe.lab.tasks import Task

_TELEMETRY = ("gap", "g_norm", "eps_norm", "cosine")
_CHUNK = 1000  # examples in a forward pass of an evaluation
SEEN = 10_000  # training examples that an evaluation looks at, at most


@dataclass
class Meter:
    """Passes, telemetry and learning curves of a run; a checkpoint holds its fields."""

    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    skipped: int = 0
    sums: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _TELEMETRY})
    curves: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in CURVES})

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        """Add one step's passes and telemetry, on its device; a plain optimizer makes one pass of each kind."""
        telemetry = getattr(optimizer, "telemetry", None)
        self.forwards += float(getattr(telemetry, "forwards", 1))
        self.backwards += float(getattr(telemetry, "backwards", 1))
        self.skipped += int(getattr(telemetry, "was_skipped", 0))
        for name, values in self.sums.items():
            if (value := getattr(telemetry, name, None)) is not None:
                values.append(value)

    def evaluate(self, epoch: int, model: nn.Module, task: Task, process: Process = ALONE) -> None:
        """Add a point to every curve.

        Telemetry is the mean over the steps since the last point; training loss and error are those of the first
        10,000 training examples.
        """
        seen = min(len(task.labels), SEEN)
        train_loss, train_error = evaluate(model, task.inputs, task.labels[:seen], process, task.own)
        _, test_error = evaluate(model, task.test_inputs, task.test_labels, process, task.own)
        point = {"epoch": epoch, "train_loss": train_loss, "train_error": train_error, "test_error": test_error}
        for name, values in self.sums.items():
            numbers = [float(value) for value in values]
            point[name] = math.fsum(numbers) / len(numbers) if numbers else math.nan
            values.clear()
        for name, value in point.items():
            self.curves[name].append(finite(value))

    def latest(self) -> dict[str, float | None]:
        """Return the last point of every curve."""
        return {name: values[-1] for name, values in self.curves.items() if values}


@torch.no_grad()
def evaluate(
    model: nn.Module, inputs: Any, labels: Tensor, process: Process = ALONE, own: OwnTask | None = None
) -> tuple[float, float]:
    """Return the mean loss and the metric, the share of wrong answers, on the first ``len(labels)`` examples.

    The processes share the examples. Each makes the same number of forward passes, which sharded parameters need.
    """
    model.eval()
    loss_of, metric_of = losses(own), metrics(own)[0]
    share, seen = math.ceil(len(labels) / process.world), []
    sums = torch.zeros(2, dtype=torch.float64, device=process.device)
    whole = own is not None and own.whole
    if whole and process.world > 1:
        raise LabError("a metric of whole sets is measured by one process alone; leave --devices out")
    for rows in torch.arange(share).split(_CHUNK):
        mine = rows + process.rank * share
        counted = (mine < len(labels)).to(process.device)
        mine = mine.clamp(max=len(labels) - 1)
        with process.autocast():
            outputs = model(inputs[mine])
        seen += [(outputs, labels[mine])] if whole else []
        of_each = (loss_of,) if whole else (loss_of, metric_of)
        for i, of in enumerate(of_each):
            sums[i] += of(outputs, labels[mine])[counted].double().sum()
    model.train()
    loss, error = (process.total(sums) / len(labels)).tolist()
    return loss, float(metric_of(*map(torch.cat, zip(*seen, strict=True)))) if whole else error


def keep(path: Path, step: int) -> None:
    """Keep the lines of a file of metrics up to a step; later ones are made again."""
    write(path, "".join(json.dumps(line) + "\n" for line in read(path) if line["step"] <= step))


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a JSON object as one line; numbers that are not finite become null."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file, without one that a killed process left half written."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    lines = []
    for text in texts:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
