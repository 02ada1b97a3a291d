"""What is counted and measured while a run goes on."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.place import ALONE, Place
from steppe.lab.record import CURVES, finite
from steppe.lab.tasks import Task

_TELEMETRY = ("gap", "g_norm", "eps_norm", "cosine")
_CHUNK = 1000  # examples in a forward pass of an evaluation
SEEN = 10_000  # training examples that an evaluation looks at, at most


@dataclass
class Meter:
    """Passes, telemetry and learning curves of a run."""

    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    skipped: int = 0
    sums: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _TELEMETRY})
    curves: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in CURVES})

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        """Add one step's passes and telemetry, on its device; a plain optimizer does one pass of each kind."""
        telemetry = getattr(optimizer, "telemetry", None)
        self.forwards += 1 if telemetry is None else float(telemetry.forwards)
        self.backwards += 1 if telemetry is None else float(telemetry.backwards)
        self.skipped += 0 if telemetry is None else int(telemetry.was_skipped)
        for name, values in self.sums.items():
            value = getattr(telemetry, name, None)
            if value is not None:
                values.append(value)

    def evaluate(self, epoch: int, model: nn.Module, task: Task, place: Place = ALONE) -> float:
        """Add a point to every curve and return the test error.

        Telemetry is the mean over the steps since the last point; training loss and error are those of the first
        10,000 training examples.
        """
        seen = min(len(task.labels), SEEN)
        train_loss, train_error = evaluate(model, task.inputs, task.labels[:seen], place)
        _, test_error = evaluate(model, task.test_inputs, task.test_labels, place)
        point = {"epoch": epoch, "train_loss": train_loss, "train_error": train_error, "test_error": test_error}
        for name, values in self.sums.items():
            numbers = [float(value) for value in values]
            point[name] = math.fsum(numbers) / len(numbers) if numbers else math.nan
            values.clear()
        for name, value in point.items():
            self.curves[name].append(finite(value))
        return test_error

    def latest(self) -> dict[str, float | None]:
        """Return the last point of every curve."""
        return {name: values[-1] for name, values in self.curves.items() if values}


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Any, labels: Tensor, place: Place = ALONE) -> tuple[float, float]:
    """Return the mean loss and the share of wrong answers on the first `len(labels)` examples.

    Processes share the examples, and forward passes of equal number, which sharded parameters need.
    """
    model.eval()
    share = math.ceil(len(labels) / place.world)
    sums = torch.zeros(2, dtype=torch.float64, device=place.device)
    for rows in torch.arange(share).split(_CHUNK):
        mine = rows + place.rank * share
        counted = (mine < len(labels)).to(place.device)
        mine = mine.clamp(max=len(labels) - 1)
        with place.autocast():
            logits = model(inputs[mine]).float()
        losses = nn.functional.cross_entropy(logits, labels[mine], reduction="none")
        wrong = logits.argmax(1) != labels[mine]
        sums += torch.stack([losses[counted].double().sum(), wrong[counted].double().sum()])
    model.train()
    loss, error = (place.total(sums) / len(labels)).tolist()
    return loss, error
