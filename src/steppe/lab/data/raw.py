"""All examples of a source, as its reader returns them, before a seed chooses among them."""

from dataclasses import dataclass

from torch import Tensor

from steppe.lab.errors import LabError
from steppe.lab.inputs import Fields, Files
from steppe.lab.own import OwnTask

Constants = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel, of values in [0, 1]


@dataclass(frozen=True)
class RawData:
    """All examples of a source.

    Args:
        inputs: images as bytes, shape (n, channels, height, width), in memory or in files; or vectors as floats.
        labels: class numbers, shape (n,).
        test_inputs: like ``inputs``; None where each seed holds out test examples from ``inputs``.
        test_labels: like ``labels``.
        classes: number of classes.
        constants: what images are standardised by; None measures it on the training examples chosen.
        own: what else a user's task brings; its labels are anything if ``classes`` is 0.
        held: how many of the last examples a user's task holds out for validation; 0 draws them.
        scale: standardise float inputs too, by the mean and standard deviation of all their values.

    Raises:
        LabError: there are no examples, not one label for each, or labels outside 0 to classes - 1.
    """

    inputs: Tensor | Files | Fields
    labels: Tensor
    test_inputs: Tensor | Files | Fields | None
    test_labels: Tensor | None
    classes: int
    constants: Constants | None = None
    scale: bool = False
    own: OwnTask | None = None
    held: int = 0

    def __post_init__(self) -> None:
        for name, inputs, labels in (
            ("training", self.inputs, self.labels),
            ("test", self.test_inputs, self.test_labels),
        ):
            if inputs is None or labels is None:
                continue
            if len(inputs) != len(labels):
                raise LabError(f"{len(inputs)} {name} examples but {len(labels)} labels")
            if len(labels) == 0:
                raise LabError(f"there are no {name} examples")
            if not self.classes:
                continue
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.classes:
                raise LabError(f"{name} labels must lie in 0 to {self.classes - 1}, they go from {low} to {high}")
