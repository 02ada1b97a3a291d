"""What a reader hands over: all examples of a source, before a seed has chosen among them."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from steppe.lab.inputs import Files
from steppe.lab.settings import LabError

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and spread of each channel, of values in [0, 1]
Texts = list[tuple[str, ...]]  # one text an example, or two that are compared


@dataclass(frozen=True)
class Pool:
    """All examples of a source.

    Args:
        inputs: images as bytes, shape (n, channels, height, width), in memory or in files; vectors as floats; texts.
        labels: class numbers, shape (n,).
        test_inputs: likewise; None where each seed sets its own examples aside.
        test_labels: likewise.
        classes: how many there are.
        constants: what images are standardised by; None measures it on the training examples chosen.
        scale: standardise float inputs too, by their one mean and spread.
    """

    inputs: Tensor | Files | Texts
    labels: Tensor
    test_inputs: Any
    test_labels: Tensor | None
    classes: int
    constants: Constants | None = None
    scale: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run could use, before anything is trained on it."""
        for name, inputs, labels in (
            ("training", self.inputs, self.labels),
            ("test", self.test_inputs, self.test_labels),
        ):
            if labels is None:
                continue
            if len(inputs) != len(labels):
                raise LabError(f"{len(inputs)} {name} examples but {len(labels)} labels")
            if len(labels) == 0:
                raise LabError(f"there are no {name} examples")
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise LabError(f"{name} labels must lie in 0 to {self.classes - 1}, they go from {low} to {high}")
