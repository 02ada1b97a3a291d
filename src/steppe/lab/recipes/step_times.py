"""Step times of several methods on one machine, interleaved, so that a busy moment slows all of them alike."""

import time
from collections.abc import Mapping
from statistics import median

from torch import nn

import steppe
from steppe.lab import spec, tasks
from steppe.lab.runs import Run
from steppe.lab.settings import Settings
from steppe.lab.train import initial_model, orders

ROUNDS, STEPS = 7, 8


def multiples(settings: Settings, methods: Mapping[str, spec.Method]) -> dict[str, str]:
    """Return by method the epochs that take as long as twice the common number of SGD, as a multiple of that number.

    The first method is SGD itself. Each method takes 8 steps a round; the first round only warms up, and the median of
    the others counts.
    """
    timers = {hole: _Timer(settings, method) for hole, method in methods.items()}
    rounds = [{hole: timer.seconds() for hole, timer in timers.items()} for _ in range(ROUNDS)][1:]
    seconds = {hole: median(each[hole] for each in rounds) for hole in timers}
    budget = 2 * next(iter(seconds.values()))
    return {hole: f"{max(budget / each, 0.01):.2f}x" for hole, each in seconds.items()}


class _Timer:
    """A model that one method trains on, some steps at a time."""

    def __init__(self, settings: Settings, method: spec.Method) -> None:
        run = Run(method, 0, settings)
        self.task = tasks.load(settings, 0)
        self.model = initial_model(run, self.task)
        self.criterion = nn.CrossEntropyLoss(reduction="none")
        full = steppe.Batch.supervised(self.model, self.criterion, self.task.inputs, self.task.labels)
        self.optimizer = spec.build(method, self.model, settings, full=full)
        self.rows = next(orders(run, self.task))

    def seconds(self) -> float:
        """Return the time of one round."""
        started = time.perf_counter()
        for step in range(STEPS):
            rows = self.rows[step % len(self.rows)]
            data = self.task.inputs[rows], self.task.labels[rows]
            self.optimizer.step(steppe.Batch.supervised(self.model, self.criterion, *data))  # type: ignore[arg-type] # torch's stub wants a float
        return time.perf_counter() - started
