"""Step times of several methods on one machine, interleaved, so that a busy moment slows all of them alike."""

from collections.abc import Mapping
from itertools import islice
from statistics import median

from steppe.lab import spec
from steppe.lab.runs import Run
from steppe.lab.settings import Settings
from steppe.lab.train import Session

ROUNDS, STEPS = 7, 8


def multiples(settings: Settings, methods: Mapping[str, spec.Method]) -> dict[str, str]:
    """Return by method the epochs that take as long as twice the common number of SGD, as a multiple of that number.

    The first method is SGD itself. Each method takes 8 steps a round; the first round only warms up, and the median of
    the others counts.
    """
    timers = {hole: _Timer(Run(method, 0, settings)) for hole, method in methods.items()}
    rounds = [{hole: timer.seconds() for hole, timer in timers.items()} for _ in range(ROUNDS)][1:]
    seconds = {hole: median(each[hole] for each in rounds) for hole in timers}
    budget = 2 * next(iter(seconds.values()))
    return {hole: f"{max(budget / each, 0.01):.2f}x" for hole, each in seconds.items()}


class _Timer:
    """A run that trains again and again on its first batches."""

    def __init__(self, run: Run) -> None:
        self.session = Session(run)
        self.batches = list(islice(self.session.batches(), STEPS))

    def seconds(self) -> float:
        """Return the training time of one round."""
        before = self.session.meter.seconds
        for rows, examples in self.batches:
            self.session.advance(rows, examples)
        return self.session.meter.seconds - before
