"""A task of your own: data, model, loss and metric, returned by a function that the commands call by its name.

``steppe compare --task module:function`` calls ``function()`` in every process, so it must return the same each time.
It returns an :class:`OwnTask`, or a dict of its fields; regression, token and other tasks are all the same to it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.errors import LabError, reason

PerExample = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class OwnTask:
    """Data, model, loss and metric of a user's task.

    Args:
        train: inputs and targets, two tensors whose first dimension is the examples.
        test: the same of the test set. Validation examples are held out from ``train``.
        model: called without arguments once a run, with torch's random generator set to the seed.
        loss: ``loss(outputs, targets)``, one value an example, shape (n,); ``None`` is the cross-entropy of logits,
            with class numbers as targets.
        metric: ``metric(outputs, targets)``, one value an example, shape (n,); lower is better; its mean over a set is
            reported. ``None`` is the loss, or with ``loss=None`` the share of wrong answers in per cent.
        name: of the metric, for tables.

    Raises:
        LabError: data that are not pairs of tensors of equal lengths.

    Example:
        >>> def cars():  # in tasks.py; steppe compare --task tasks:cars
        ...     loss = lambda outputs, targets: (outputs - targets).square().mean(1)
        ...     return {"train": (x, y), "test": (x_test, y_test), "model": lambda: nn.Linear(8, 1), "loss": loss}
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: Callable[[], nn.Module]
    loss: PerExample | None = None
    metric: PerExample | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for name, pair in (("train", self.train), ("test", self.test)):
            if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
                raise LabError(f"a task's {name} must be two tensors, inputs and targets")
            if not len(pair[0]) == len(pair[1]) > 0:
                raise LabError(f"a task's {name} has {len(pair[0])} inputs and {len(pair[1])} targets")

    @property
    def classes(self) -> int:
        """Return the number of classes, 0 if the targets are not class numbers."""
        return 0 if self.loss else int(max(self.train[1].max(), self.test[1].max())) + 1

    def check(self) -> None:
        """Call model, loss and metric on two examples.

        Raises:
            LabError: one of them raises, or gives another shape than one value an example.
        """
        inputs, targets = (part[:2] for part in self.train)
        try:
            outputs = self.model()(inputs)
            functions = {"loss": self.loss, "metric": self.metric}
            shapes = {name: of(outputs, targets).shape for name, of in functions.items() if of}
        except Exception as error:  # a user's functions may raise anything
            raise LabError(f"the task's functions fail on two examples: {reason(error)}") from error
        for name, shape in shapes.items():
            if shape != targets.shape[:1]:
                raise LabError(f"{name} must return one value an example, shape (2,) for two, not {tuple(shape)}")


def named(made: Any, name: str) -> OwnTask:
    """Return the task that the function called ``name`` returned, a dict or an :class:`OwnTask`."""
    try:
        return made if isinstance(made, OwnTask) else OwnTask(**made)
    except TypeError as error:
        raise LabError(f"{name} must return train, test, model and perhaps loss, metric and name: {error}") from error


def losses(task: OwnTask | None, smoothing: float = 0.0) -> PerExample:
    """Return the loss of every example as a function of outputs and targets."""
    if task and task.loss:
        return task.loss
    return lambda outputs, labels: nn.functional.cross_entropy(
        outputs.float(), labels, reduction="none", label_smoothing=smoothing
    )


def metrics(task: OwnTask | None) -> tuple[PerExample, str]:
    """Return the metric of every example as a function of outputs and targets, and its name.

    A metric whose name ends with % is a share in [0, 1].
    """
    if task and task.metric:
        return task.metric, task.name or "metric"
    if task and task.loss:
        return task.loss, task.name or "loss"
    return lambda outputs, labels: (outputs.argmax(1) != labels).to(torch.float64), "error %"
