"""A task of your own: data, model, loss and metric, returned by a function that the commands call by its name.

``steppe compare --task module:function`` calls ``function()`` in every process, so it must return the same each time.
It returns an :class:`OwnTask`, or a dict of its fields; regression, token and other tasks are all the same to it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from steppe.lab.errors import LabError, reason, unknown
from steppe.lab.inputs import Fields

PerExample = Callable[[Any, Tensor], Tensor]
_CHECKED = 1000  # test examples that a metric of whole sets is tried on


@dataclass(frozen=True)
class OwnTask:
    """Data, model, loss and metric of a user's task.

    Args:
        train: inputs and targets; their first dimension is the examples. Inputs are a tensor or a dict of tensors.
        test: the same of the test set.
        validation: the same of the examples that searches judge by; final runs train on them too. ``None`` holds them
            out from ``train``, drawn anew for each seed.
        model: called without arguments once a run, with torch's random generator set to the seed.
        loss: ``loss(outputs, targets)``, one value an example, shape (n,); ``None`` is the cross-entropy of logits,
            with class numbers as targets.
        metric: ``metric(outputs, targets)``, one value an example, shape (n,); its mean over a set is reported.
            ``None`` is the loss, or with ``loss=None`` the share of wrong answers in per cent.
        whole: the metric gets all outputs and targets of a set at once and returns one number, such as an AUC.
        higher: a higher metric is better.
        name: of the metric, for tables.

    Raises:
        LabError: data that are not pairs of equal lengths, or, without a loss, targets that are not class numbers.

    Example:
        >>> def cars():  # in tasks.py; steppe compare --task tasks:cars
        ...     loss = lambda outputs, targets: (outputs - targets).square().mean(1)
        ...     return {"train": (x, y), "test": (x_test, y_test), "model": lambda: nn.Linear(8, 1), "loss": loss}
    """

    train: tuple[Any, Tensor]
    test: tuple[Any, Tensor]
    model: Callable[[], nn.Module]
    loss: PerExample | None = None
    metric: PerExample | None = None
    name: str = ""
    validation: tuple[Any, Tensor] | None = None
    whole: bool = False
    higher: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "test", "validation"):
            if (pair := getattr(self, name)) is not None:
                object.__setattr__(self, name, _pair(name, pair, classes=self.loss is None))
        if (self.whole or self.higher) and self.metric is None:
            raise LabError("whole and higher say what the metric is, and the task has no metric")

    @property
    def classes(self) -> int:
        """Return the number of classes, 0 if the targets are not class numbers."""
        parts = [pair for pair in (self.train, self.test, self.validation) if pair is not None]
        return 0 if self.loss else int(max(targets.max() for _, targets in parts)) + 1

    def check(self) -> None:
        """Call model, loss and metric on two examples, a metric of whole sets on the test set.

        Raises:
            LabError: one of them raises, or gives another shape than one value an example.
        """
        self._try("loss", self.loss or losses(None), self.train, 2)
        if self.metric is not None:
            self._try("metric", self.metric, self.test, _CHECKED if self.whole else 2)

    @torch.no_grad()
    def _try(self, name: str, function: PerExample, pair: tuple[Any, Tensor], count: int) -> None:
        inputs, targets = (part[:count] for part in pair)
        try:
            found = torch.as_tensor(function(self.model()(inputs), targets))
        except Exception as error:  # a user's functions may raise anything
            some = "two" if count == 2 else len(targets)
            raise LabError(f"the task's model or {name} fails on {some} examples: {reason(error)}") from error
        if name == "metric" and self.whole:
            if found.numel() != 1:
                raise LabError(f"a metric with whole=True must return one number, not shape {tuple(found.shape)}")
        elif found.shape != targets.shape[:1]:
            hint = "; for one number of a whole set add whole=True" if name == "metric" and not found.ndim else ""
            raise LabError(
                f"{name} must return one value an example, shape (2,) for two, not {tuple(found.shape)}{hint}"
            )


def _pair(name: str, pair: Any, classes: bool) -> tuple[Any, Tensor]:
    """Return inputs and targets as sets that are indexed by row numbers."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise LabError(f"a task's {name} must be a pair, inputs and targets, not {type(pair).__name__}")
    inputs, targets = Fields.of(pair[0]) if isinstance(pair[0], dict) else pair[0], pair[1]
    if not isinstance(inputs, Tensor | Fields) or not isinstance(targets, Tensor):
        kinds = " and ".join(f"{type(part).__module__}.{type(part).__name__}" for part in pair)
        raise LabError(f"a task's {name} must be tensors (of inputs also a dict of them), not {kinds}")
    if not len(inputs) == len(targets) > 0:
        raise LabError(f"a task's {name} has {len(inputs)} inputs and {len(targets)} targets")
    if classes and (targets.is_floating_point() or targets.ndim != 1):
        shape = f"{str(targets.dtype).removeprefix('torch.')} {tuple(targets.shape)}"
        raise LabError(f"without a loss a task's targets are class numbers of shape (n,), and {name} has {shape}")
    return inputs, targets


def named(made: Any, name: str) -> OwnTask:
    """Return the task that the function called ``name`` returned, a dict or an :class:`OwnTask`."""
    if isinstance(made, OwnTask):
        return made
    known = [field.name for field in fields(OwnTask)]
    if strange := [key for key in made if key not in known]:
        raise unknown(f"{name} returns the key {strange[0]!r}, which a task does not have", str(strange[0]), known)
    if missing := [key for key in ("train", "test", "model") if key not in made]:
        raise LabError(f"{name} must return train, test and model; {', '.join(missing)} is missing")
    return OwnTask(**made)


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
