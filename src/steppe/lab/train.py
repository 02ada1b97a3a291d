"""The training of one run: the task of a seed, a model, an optimizer, one loop, a record."""

import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steppe
from steppe.engine.parameters import parameters_of
from steppe.engine.supervised import Supervised
from steppe.lab import augment, checkpoint, data, models, spec, tasks
from steppe.lab.errors import LabError, NotFiniteError
from steppe.lab.hardware import ALONE, CPU, Hardware, Process
from steppe.lab.inputs import ahead, finish, raw
from steppe.lab.metrics import Meter
from steppe.lab.own import losses, metrics
from steppe.lab.record import Record, environment
from steppe.lab.runs import Run
from steppe.lab.settings import Settings

_POINTS = 30  # evaluations per common number of epochs, at most (one epoch in two of 60)
COLLAPSE = 0.95  # of log(#classes), the loss of random guesses
LEARNED = 100  # steps after which a net that learns has left it


def train(run: Run, hardware: Hardware = CPU) -> Record:
    """Train one run from its first step, without a directory; return its record."""
    session = Session(run, hardware.open())
    deque(session.fit(), maxlen=0)
    return session.record()


class Session:
    """A run in training: its task, model, optimizer, schedule and numbers, and their state for checkpoints."""

    def __init__(self, run: Run, process: Process = ALONE) -> None:
        if run.settings.batch_size % process.world:
            raise LabError(f"batch size {run.settings.batch_size} is no multiple of the {process.world} processes")
        self.run, self.process = run, process
        self.task = tasks.load(run.settings, run.seed).to(process.device)
        self.model = process.setup(initial_model(run, self.task))
        self.loss = InPrecision(losses(self.task.own, run.settings.label_smoothing), process)
        self.optimizer = spec.build(run.method, self.model, run.settings, full=self.full)
        self.steps = run.epochs * run.settings.steps_per_epoch
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._factor)
        self.augment = data.augmentation(run.settings)
        self.meter, self.step = Meter(), 0
        self._loss: Any = math.nan

    def fit(self) -> Iterator[bool]:
        """Train to the end; yield after every step whether the model was evaluated after it."""
        every = max(1, self.run.settings.epochs // _POINTS)
        for rows, examples in self.batches():
            self.advance(rows, examples)
            epoch, inside = divmod(self.step, self.run.settings.steps_per_epoch)
            evaluated = not inside and (epoch % every == 0 or epoch == self.run.epochs)
            if evaluated:
                self.evaluate(epoch)
            yield evaluated

    def _factor(self, step: int) -> float:
        """Return the factor of the learning rate: a linear rise times a cosine to 0."""
        rise = min(1.0, (step + 1) / (self.run.settings.warmup + 1))
        return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self) -> Iterator[tuple[Tensor, Any]]:
        """Yield the remaining batches: the row numbers of each, and this process's raw examples of them."""
        left = islice(chain.from_iterable(orders(self.run, self.task)), self.step, None)
        return ahead(lambda rows: raw(self.task.inputs, self.process.share(rows)), left, self.task.inputs)

    def advance(self, rows: Tensor, examples: Any) -> None:
        """Take one optimizer step on a batch; ``examples`` are the raw ones of this process."""
        started = time.perf_counter()
        if self.augment != "none":
            examples = self._augmented(len(rows), examples)
        labels = self.task.labels[self.process.share(rows).to(self.process.device)]
        batch: Any = steppe.Batch(self.model, self.loss, (finish(self.task.inputs, examples), labels))
        self._loss = self.optimizer.step(batch)
        self.schedule.step()
        self.meter.count(self.optimizer)
        self.step += 1
        self.meter.seconds += time.perf_counter() - started

    def _augmented(self, count: int, images: Tensor) -> Tensor:
        """Return augmented images; the random numbers depend on seed and step alone, not on the number of processes."""
        stream = tasks.stream(self.run.seed, f"augment/{self.step}")
        change = augment.draw(self.augment, count, (images.shape[-2], images.shape[-1]), stream)
        mine = {key: self.process.share(values) for key, values in change.items()}
        side = self.task.inputs.shape[-1]  # type: ignore[union-attr] # only images are augmented
        return augment.apply(images, mine, side)

    def evaluate(self, epoch: int) -> None:
        """Add a point to the curves; its time does not count as training."""
        started = time.perf_counter()
        self.process.synchronise()
        self.meter.seconds += time.perf_counter() - started
        self.meter.evaluate(epoch, self.model, self.task, self.process)

    def last_loss(self) -> float:
        """Return the loss of this process's part of the last batch; waits for the device."""
        return float(self._loss)

    def full(self) -> Tensor:
        """Compute the gradient on all training examples and return their loss: the closure of n-SAM."""
        self.model.zero_grad(set_to_none=True)
        count, total = len(self.task.labels), torch.zeros((), device=self.process.device)
        for rows in torch.arange(count).split(1000):
            mine = self.process.share(rows)
            losses = self.loss(self.model, (self.task.inputs[mine], self.task.labels[mine]))
            loss = losses.sum() * self.process.world / count  # DDP takes the mean over processes
            loss.backward()
            total += loss.detach()
        return total

    # ---- to a checkpoint and back

    def state(self) -> dict[str, Any]:
        """Return everything that later steps depend on, without copies. Every process must call it."""
        return {
            "step": self.step,
            "model": checkpoint.whole(dict(self.model.state_dict())),
            "optimizer": checkpoint.whole(self.optimizer.state_dict()),
            "schedule": self.schedule.state_dict(),
            "meter": asdict(self.meter),
            "random": self.process.gather(checkpoint.random_state()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set everything to a state that :meth:`state` returned."""
        own = self.model.state_dict()
        self.model.load_state_dict({key: checkpoint.sharded(value, own[key]) for key, value in state["model"].items()})
        parameters = parameters_of(self.optimizer)
        for i, memory in state["optimizer"]["state"].items():
            memory.update({key: checkpoint.sharded(value, parameters[i]) for key, value in memory.items()})
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.meter, self.step = Meter(**state["meter"]), state["step"]
        if len(state["random"]) == self.process.world:
            checkpoint.set_random_state(state["random"][self.process.rank])

    def record(self) -> Record:
        """Return the record of a session that has reached its end."""
        run, meter = self.run, self.meter
        last: dict[str, Any] = meter.latest()
        if last["test_error"] is None:
            raise NotFiniteError(f"the metric of {run} is not finite at the end")
        return Record(
            method=str(run.method),
            rule=repr(self.optimizer.rule) if hasattr(self.optimizer, "rule") else "none: the base optimizer alone",
            rho=self.optimizer.param_groups[0].get("rho"),
            base=_base(run, self.optimizer),
            seed=run.seed,
            settings=run.settings.to_dict(),
            epochs=run.epochs,
            curves=meter.curves,
            test_error=last["test_error"],
            train_error=last["train_error"],
            train_loss=last["train_loss"],
            classes=self.task.classes,
            steps=self.steps,
            forwards=meter.forwards,
            backwards=meter.backwards,
            skipped=meter.skipped,
            seconds=meter.seconds,
            collapsed=collapsed(last["train_loss"], self.task.classes, self.steps),
            metric=metrics(self.task.own)[1],
            higher=self.task.own is not None and self.task.own.higher,
            environment=environment() | self.process.describe(),
        )


@dataclass(frozen=True)
class InPrecision(Supervised):
    """The loss of every example; the model runs in the precision of the hardware."""

    process: Process

    def __call__(self, model: nn.Module, data: Any) -> Tensor:
        """Return the losses, shape ``(n,)``."""

        def run(inputs: Any) -> Any:
            with self.process.autocast():
                return model(inputs)

        return super().__call__(run, data)  # type: ignore[arg-type]


def initial_model(run: Run, task: tasks.Task) -> nn.Module:
    """Return the seed's model, and seed the global random generators for the optimizer and the training."""
    seed_all(tasks.stream(run.seed, "init").initial_seed())
    model = built(run, task)
    if run.settings.start is not None:
        model.load_state_dict(_start(run.settings, run.seed))
    seed_all(tasks.stream(run.seed, "optimizer").initial_seed())
    return model


def seed_all(seed: int) -> None:
    """Seed the global random generators of torch, Python and NumPy, which a user's task may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def built(run: Run, task: tasks.Task) -> nn.Module:
    """Return the model of the task or of the settings, as torch's random generator makes it."""
    if task.own is not None:
        return task.own.model()
    return models.build(run.settings.model, task.inputs[0], task.classes)


@lru_cache(maxsize=1)  # a comparison runs all methods of one seed before the next seed
def _start(settings: Settings, seed: int) -> dict[str, Tensor]:
    """Return the weights that ``settings.start`` names: of a file, or of a method trained first on the same task."""
    text = settings.start or ""
    if text.endswith(".pt"):
        if not Path(text).is_file():
            raise LabError(f"no weights at {text}; save a model's state_dict there")
        weights: dict[str, Tensor] = torch.load(text, map_location="cpu", weights_only=True)
        return weights
    session = Session(Run(spec.parse(text), seed, replace(settings, start=None, lr=settings.start_lr)))
    deque(session.fit(), maxlen=0)
    return session.model.state_dict()


def orders(run: Run, task: tasks.Task) -> Iterator[list[Tensor]]:
    """Yield the row numbers of each epoch's full batches; the order depends on the seed alone."""
    draw = tasks.stream(run.seed, "order")
    for _ in range(run.epochs):
        permutation = torch.randperm(len(task.labels), generator=draw)
        yield list(torch.split(permutation, run.settings.batch_size)[: run.settings.steps_per_epoch])


def collapsed(train_loss: float | None, classes: int, steps: int) -> bool:
    """Return whether a run ended with a loss near log(#classes), as at random guesses, or with none that is finite.

    A run of a few steps is near it because it has not learned yet.
    """
    if train_loss is None:
        return True
    return bool(classes) and steps >= LEARNED and train_loss >= COLLAPSE * math.log(classes)


def _base(run: Run, optimizer: torch.optim.Optimizer) -> str:
    """Return a description of the base optimizer."""
    base, group = getattr(optimizer, "base", optimizer), optimizer.param_groups[0]
    options = ", ".join(f"{key}={group[key]!r}" for key in ("momentum", "betas", "weight_decay") if key in group)
    warmup = f"linear warm-up of {run.settings.warmup} steps, " if run.settings.warmup else ""
    return f"{type(base).__name__}(lr={run.settings.lr!r}, {options}), {warmup}cosine to 0"
