"""One run: the task of a seed, a model, an optimizer, one readable loop, a record."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import steppe
from steppe.lab import models, spec, tasks
from steppe.lab.environment import environment
from steppe.lab.record import CURVES, Record, finite
from steppe.lab.settings import LabError, Settings

_POINTS = 30  # evaluations per common number of epochs, at most (one epoch in two of 60)
_TELEMETRY = ("gap", "g_norm", "eps_norm", "cosine")
COLLAPSE = 0.95  # of log(#classes), the loss of a model that knows nothing


@dataclass(frozen=True)
class Run:
    """One method under one seed."""

    method: spec.Method
    seed: int
    settings: Settings

    @property
    def epochs(self) -> int:
        """Return how long this run trains."""
        return self.method.epochs_of(self.settings.epochs)


def train(run: Run, progress: Callable[[int, int], None] = lambda step, steps: None) -> Record:
    """Train one run from its start; `progress(step, steps)` is called after every step and may raise to stop it."""
    return fit(run, progress)[1]


def fit(run: Run, progress: Callable[[int, int], None]) -> tuple[nn.Module, Record]:
    """Train one run as :func:`train` does, and return the model too."""
    task = tasks.load(run.settings, run.seed)
    model = initial_model(run, task)
    criterion = nn.CrossEntropyLoss(reduction="none")
    optimizer = spec.build(
        run.method, model, run.settings, full=steppe.Batch.supervised(model, criterion, task.inputs, task.labels)
    )
    steps = run.epochs * run.settings.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    meter, step = Meter(), 0
    for epoch, order in enumerate(orders(run, task), start=1):
        started = time.perf_counter()
        for rows in order:
            batch = steppe.Batch.supervised(model, criterion, task.inputs[rows], task.labels[rows])
            optimizer.step(batch)  # type: ignore[arg-type] # torch's stub wants a closure that returns a float
            schedule.step()
            meter.count(optimizer)
            progress(step := step + 1, steps)
        meter.seconds += time.perf_counter() - started
        if epoch % max(1, run.settings.epochs // _POINTS) == 0 or epoch == run.epochs:
            meter.evaluate(epoch, model, task)
    return model, finished(run, optimizer, task, meter)


def initial_model(run: Run, task: tasks.Task) -> nn.Module:
    """Return the seed's model, and leave the global random state to the seed's optimizer."""
    torch.manual_seed(tasks.stream(run.seed, "init").initial_seed())
    model = models.build(run.settings.model, task.inputs[0], task.classes)
    if run.settings.start is not None:
        model.load_state_dict(_start(run.settings, run.seed))
    torch.manual_seed(tasks.stream(run.seed, "optimizer").initial_seed())
    return model


@lru_cache(maxsize=1)  # a comparison runs all methods of a seed in a row
def _start(settings: Settings, seed: int) -> dict[str, Tensor]:
    """Return the weights that `settings.start` names: of a file, or of a method trained first on the same task."""
    text = settings.start or ""
    if text.endswith(".pt"):
        if not Path(text).is_file():
            raise LabError(f"no weights at {text}; save a model's state_dict there")
        weights: dict[str, Tensor] = torch.load(text, map_location="cpu", weights_only=True)
        return weights
    before = Run(spec.parse(text), seed, replace(settings, start=None, lr=settings.start_lr))
    return fit(before, lambda step, steps: None)[0].state_dict()


def orders(run: Run, task: tasks.Task) -> Iterator[list[Tensor]]:
    """Yield each epoch's batches of row numbers, without the short last one; the order depends on the seed alone."""
    draw = tasks.stream(run.seed, "order")
    for _ in range(run.epochs):
        permutation = torch.randperm(len(task.labels), generator=draw)
        yield list(torch.split(permutation, run.settings.batch_size)[: run.settings.steps_per_epoch])


@dataclass
class Meter:
    """What is counted while a run goes on."""

    seconds: float = 0.0
    forwards: float = 0.0
    backwards: float = 0.0
    skipped: int = 0
    sums: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in _TELEMETRY})
    curves: dict[str, list[float | None]] = field(default_factory=lambda: {name: [] for name in CURVES})

    def count(self, optimizer: torch.optim.Optimizer) -> None:
        """Add one step's passes and telemetry; a plain optimizer does one pass of each kind."""
        telemetry = getattr(optimizer, "telemetry", None)
        self.forwards += 1 if telemetry is None else float(telemetry.forwards)
        self.backwards += 1 if telemetry is None else float(telemetry.backwards)
        self.skipped = 0 if telemetry is None else int(telemetry.skipped)
        for name, values in self.sums.items():
            value = getattr(telemetry, name, None)
            if value is not None:
                values.append(float(value))

    def evaluate(self, epoch: int, model: nn.Module, task: tasks.Task) -> None:
        """Add a point to every curve; telemetry is the mean over the steps since the last point."""
        train_loss, train_error = evaluate(model, task.inputs, task.labels)
        _, test_error = evaluate(model, task.test_inputs, task.test_labels)
        point = {"epoch": epoch, "train_loss": train_loss, "train_error": train_error, "test_error": test_error}
        for name, values in self.sums.items():
            point[name] = math.fsum(values) / len(values) if values else math.nan
            values.clear()
        for name, value in point.items():
            self.curves[name].append(finite(value))


@torch.inference_mode()
def evaluate(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss and the share of wrong answers."""
    model.eval()
    logits = torch.cat([model(part) for part in torch.split(inputs, 1000)])
    model.train()
    loss = nn.functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) != labels).double().mean().item()


def collapsed(train_loss: float | None, classes: int) -> bool:
    """Tell whether a run ended where it knows nothing: loss near log(#classes), or not finite."""
    return train_loss is None or not train_loss < COLLAPSE * math.log(classes)


def finished(run: Run, optimizer: torch.optim.Optimizer, task: tasks.Task, meter: Meter) -> Record:
    """Assemble the record of a run that came to its end."""
    last = {name: values[-1] for name, values in meter.curves.items()}
    group = optimizer.param_groups[0]
    base = ", ".join(f"{key}={group[key]!r}" for key in ("momentum", "weight_decay"))
    return Record(
        method=str(run.method),
        rule=repr(optimizer.rule) if hasattr(optimizer, "rule") else "none: the base optimizer alone",
        rho=group.get("rho"),
        base=f"SGD(lr={run.settings.lr!r}, {base}), cosine to 0",
        seed=run.seed,
        settings=run.settings.to_dict(),
        epochs=run.epochs,
        curves=meter.curves,
        test_error=cast(float, last["test_error"]),
        train_error=cast(float, last["train_error"]),
        train_loss=last["train_loss"],
        classes=task.classes,
        steps=run.epochs * run.settings.steps_per_epoch,
        forwards=meter.forwards,
        backwards=meter.backwards,
        skipped=meter.skipped,
        seconds=meter.seconds,
        collapsed=collapsed(last["train_loss"], task.classes),
        environment=environment(),
    )
