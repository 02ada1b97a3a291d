"""What an epoch of each method costs, in gradient passes and in seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median

from steppe.lab import spec
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.runs import Run
from steppe.lab.settings import Settings
from steppe.lab.spec import Method, base_of
from steppe.lab.train import Session

ROUNDS, STEPS = 7, 8  # of timing; LookSAM's k is at most 10 in a search


@dataclass(frozen=True)
class Price:
    """Gradient passes over the training set, and seconds, of one epoch."""

    passes: float
    seconds: float


def prices(settings: Settings, methods: Mapping[str, Method], hardware: Hardware = CPU) -> dict[str, Price]:
    """Return the price of every method by its key: the mean over its phases, for those that change in training."""
    parts = {key: spec.phases(method, base_of(settings)) for key, method in methods.items()}
    each = _measured(settings, [method for phases in parts.values() for _, method in phases], hardware)
    return {
        key: Price(
            sum(share * each[method].passes for share, method in phases),
            sum(share * each[method].seconds for share, method in phases),
        )
        for key, phases in parts.items()
    }


def _measured(settings: Settings, methods: list[Method], hardware: Hardware) -> dict[Method, Price]:
    """Return the price of every method.

    Steps are timed interleaved, so that a busy moment slows all methods alike: each takes 8 a round; the first round
    only warms up, and the median of the others counts.
    """
    sessions = {m: Session(Run(m, 0, m.under(settings)), hardware.open()) for m in methods}
    batches = {key: list(islice(session.batches(), STEPS)) for key, session in sessions.items()}
    seconds: dict[Method, list[float]] = {key: [] for key in methods}
    for _ in range(ROUNDS):
        for key, session in sessions.items():
            session.process.synchronise()
            before = session.meter.seconds
            for rows, examples in batches[key]:
                session.advance(rows, examples)
            seconds[key].append((session.meter.seconds - before) / len(batches[key]))
    return {
        key: Price(
            session.meter.backwards / (ROUNDS * len(batches[key])),
            median(seconds[key][1:]) * session.run.settings.steps_per_epoch,
        )
        for key, session in sessions.items()
    }
