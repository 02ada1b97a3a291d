"""Whether a run has stayed where a model sits that knows nothing of its inputs: told once."""

from collections import Counter, deque
from dataclasses import dataclass, field
from math import log
from typing import Any

from torch import Tensor, nn

from steppe.batch import Batch, chunks_of
from steppe.engine.checks import warn
from steppe.engine.supervised import Supervised

EVERY = 50  # steps between two readings, which wait for the device
READINGS = 20  # in a row
NEAR = 0.97  # of the entropy of the labels


@dataclass
class Guess:
    """What it takes to tell: the last losses, and how often each class has been seen.

    The cross-entropy of a model that knows nothing but the shares of the classes is the entropy of the labels,
    ``log(classes)`` where they are alike. A perturbation that is too long for the first steps throws a network there,
    and it stays. Only batches are judged whose criterion is a plain ``nn.CrossEntropyLoss`` of class numbers.
    """

    losses: deque[float] = field(default_factory=lambda: deque(maxlen=READINGS))
    labels: Counter[int] = field(default_factory=Counter)
    told: bool = False

    def see(self, step: int, closure: Any, loss: Any, sampled: bool) -> None:
        """Read every ``EVERY``-th step, and warn where no reading of the last thousand steps was below a guess."""
        if self.told or (step + 1) % EVERY:
            return
        found = class_numbers(closure)
        if not found:
            return
        self.labels.update(found)
        self.losses.append(float(loss))
        floor = self.entropy()
        if len(self.losses) < READINGS or floor is None or not min(self.losses) >= NEAR * floor:
            return
        self.told = True
        warn(
            f"for the last {EVERY * READINGS} steps the loss, {self.losses[-1]:.3g}, was not below {floor:.3g}, that "
            "of a model that knows nothing but the shares of the classes. Is the radius too large: halve rho, or start "
            "plainly, rho=schedule.Window(rho, start=1000)" + (", or limit the correction, clip=0.5" if sampled else "")
        )

    def entropy(self) -> float | None:
        """Return the entropy of the labels so far, in nats; ``None`` of one class, or of too many to tell."""
        n, classes = sum(self.labels.values()), len(self.labels)
        if not 1 < classes <= n / 4:
            return None
        return -sum(k / n * log(k / n) for k in self.labels.values()) + (classes - 1) / (2 * n)  # Miller and Madow 1955


def class_numbers(closure: Any) -> list[int]:
    """Return the labels of a batch whose loss is a plain cross-entropy of class numbers; of others none."""
    found: list[int] = []
    for part in chunks_of(closure) if isinstance(closure, Batch) else ():
        criterion = part.loss.criterion if isinstance(part.loss, Supervised) else None
        plain = type(criterion) is nn.CrossEntropyLoss and criterion.weight is None and not criterion.label_smoothing
        labels = part.data[1] if plain else None
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            return []
        found += labels[labels != criterion.ignore_index].flatten().tolist()  # type: ignore[union-attr]
    return found
