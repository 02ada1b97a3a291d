"""The settings of a comparison: every method and every seed is trained under one ``Settings`` value."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

from steppe.engine import checks
from steppe.lab.errors import LabError

OPTIMIZERS = ("sgd", "adamw")
AUGMENTATIONS = ("auto", "none", "crop", "crop-flip", "resized-crop-flip")


def _one_of(known: tuple[str, ...], name: str, value: str) -> None:
    if value not in known:
        raise LabError(f"{name} must be one of {', '.join(known)}, got {value!r}")


_positive = partial(checks.number, expected="a positive number", low=math.nextafter(0.0, 1.0))
_below_one = partial(checks.number, expected="a share of at least 0 and less than 1", below=1.0)
_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "train_size": checks.positive_integer,
    "noise": checks.share,
    "epochs": checks.positive_integer,
    "batch_size": checks.positive_integer,
    "lr": _positive,
    "weight_decay": checks.non_negative,
    "optimizer": partial(_one_of, OPTIMIZERS),
    "warmup": partial(checks.number, expected="a number of steps >= 0"),
    "label_smoothing": _below_one,
    "augment": partial(_one_of, AUGMENTATIONS),
    "image_size": checks.positive_integer,
    "validation": _below_one,
    "start_lr": _positive,
}


@dataclass(frozen=True)
class Settings:
    """Data, model and schedule that every run of a comparison shares.

    Raises:
        LabError: a value that no run can use.
    """

    data: str = "digits"
    data_dir: str | None = None
    train_size: int = 1000
    noise: float = 0.4  # share of training labels redrawn uniformly from all classes
    model: str = "mlp-256-256"
    epochs: int = 150
    batch_size: int = 128
    lr: float = 0.05  # at the first step; cosine to 0 at the last
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: str = "sgd"  # the base of every method: sgd or adamw
    warmup: int = 0  # steps over which the learning rate rises linearly to its cosine
    label_smoothing: float = 0.0  # share of the training target spread over all classes
    augment: str = "auto"  # of training images, see steppe.lab.augment; auto: what is usual for the data
    image_size: int | None = None  # side of images in pixels; None: their size in the data
    validation: float = 0.0  # share of the training examples held out; errors are then on these, never on the test set
    test_seed: int | None = None  # draws the digits' test set, the same for all seeds; None: each seed draws one
    start: str | None = None  # initial weights: a method trained first, SGD(epochs=50), or a file x.pt
    start_lr: float = 0.05  # of the method in start

    def __post_init__(self) -> None:
        """Refuse values that no run can use."""
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            try:
                if value is not None or name != "image_size":
                    check(name.replace("_", "-"), value)
            except (TypeError, ValueError) as error:
                raise LabError(str(error)) from None
        if self.data == "digits" and self.data_dir is not None:
            raise LabError("digits come with scikit-learn; data-dir goes with --data fashion-mnist")
        if self.batch_size > self.fitted:
            raise LabError(
                f"batch size {self.batch_size} exceeds the {self.fitted} training examples: no full batch fits"
            )

    @property
    def fitted(self) -> int:
        """Return the number of training examples without those held out for validation."""
        return self.train_size - round(self.validation * self.train_size)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of full batches in an epoch; the short last batch is dropped."""
        return self.fitted // self.batch_size

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return asdict(self)


def differences(old: Settings, new: Settings) -> list[str]:
    """Return every setting in which two comparisons differ, as ``name was x, now y``."""
    names = [field.name for field in fields(Settings) if getattr(old, field.name) != getattr(new, field.name)]
    return [f"{name.replace('_', '-')} was {getattr(old, name)!r}, now {getattr(new, name)!r}" for name in names]
