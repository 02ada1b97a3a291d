"""All examples of a source, as its reader returns them, before a seed chooses among them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steppe.lab.errors import LabError
from steppe.lab.inputs import Files

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel, of values in [0, 1]
Texts = list[tuple[str, ...]]  # one text an example, or two that are compared


@dataclass(frozen=True)
class RawData:
    """All examples of a source.

    Args:
        inputs: images as bytes, shape (n, channels, height, width), in memory or in files; vectors as floats; texts.
        labels: class numbers, shape (n,).
        test_inputs: like ``inputs``; None where each seed holds out its own test examples.
        test_labels: like ``labels``.
        classes: number of classes.
        constants: what images are standardised by; None measures it on the training examples chosen.
        scale: standardise float inputs too, by their one mean and standard deviation.

    Raises:
        LabError: there are no examples, not one label for each, or labels outside 0 to classes - 1.
    """

    inputs: Tensor | Files | Texts
    labels: Tensor
    test_inputs: Any
    test_labels: Tensor | None
    classes: int
    constants: Constants | None = None
    scale: bool = False

    def __post_init__(self) -> None:
        _check("training", self.inputs, self.labels, self.classes)
        if self.test_labels is not None:
            _check("test", self.test_inputs, self.test_labels, self.classes)


def _check(name: str, inputs: Any, labels: Tensor, classes: int) -> None:
    if len(inputs) != len(labels):
        raise LabError(f"{len(inputs)} {name} examples but {len(labels)} labels")
    if len(labels) == 0:
        raise LabError(f"there are no {name} examples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LabError(f"{name} labels must lie in 0 to {classes - 1}, they go from {low} to {high}")
