"""What a comparison holds fixed: every method and every seed is trained under one `Settings` value."""

import math
from dataclasses import asdict, dataclass, fields

OPTIMIZERS = ("sgd", "adamw")
AUGMENTATIONS = ("auto", "none", "crop", "crop-flip", "resized-crop-flip")


class LabError(Exception):
    """A mistake in what was asked for, told to the user without a traceback."""


@dataclass(frozen=True)
class Settings:
    """Data, model and schedule shared by every run of a comparison."""

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
    augment: str = "auto"  # what happens to training images, steppe.lab.augment; auto: what is usual for the data
    image_size: int | None = None  # side of images in pixels; None: their own, 224 for a folder of files
    validation: float = 0.0  # share of the training examples held out; errors are then on these, never on the test set
    test_seed: int | None = None  # draws the digits' test set, the same for all seeds; None: each seed draws its own
    start: str | None = None  # weights before the first step: a method trained first, SGD(epochs=50), or a file x.pt
    start_lr: float = 0.05  # of the method in start

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        for name in ("train_size", "epochs", "batch_size"):
            _require(isinstance(getattr(self, name), int) and getattr(self, name) > 0, name, self, "a positive integer")
        _require(0 <= self.noise <= 1, "noise", self, "a share between 0 and 1")
        for name in ("lr", "start_lr"):
            _require(0 < getattr(self, name) < math.inf, name, self, "a positive number")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self, "a number >= 0")
        size = self.image_size
        _require(size is None or (isinstance(size, int) and size > 0), "image_size", self, "a positive integer")
        _require(isinstance(self.warmup, int) and self.warmup >= 0, "warmup", self, "a number of steps >= 0")
        _require(0 <= self.label_smoothing < 1, "label_smoothing", self, "a share of at least 0 and less than 1")
        for name, known in (("optimizer", OPTIMIZERS), ("augment", AUGMENTATIONS)):
            _require(getattr(self, name) in known, name, self, f"one of {', '.join(known)}")
        if self.data == "digits" and self.data_dir is not None:
            raise LabError("digits come with scikit-learn; data-dir goes with --data fashion-mnist")
        _require(0 <= self.validation < 1, "validation", self, "a share of at least 0 and less than 1")
        if self.batch_size > self.fitted:
            raise LabError(
                f"batch size {self.batch_size} exceeds the {self.fitted} training examples: no full batch fits"
            )

    @property
    def fitted(self) -> int:
        """Training examples less those held out for validation."""
        return self.train_size - round(self.validation * self.train_size)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch; the short last batch is dropped, so that every step sees `batch_size` examples."""
        return self.fitted // self.batch_size

    def to_dict(self) -> dict[str, object]:
        """Return plain data for JSON."""
        return asdict(self)


def _require(holds: bool, name: str, settings: Settings, wanted: str) -> None:
    if not holds:
        raise LabError(f"{name.replace('_', '-')} must be {wanted}, not {getattr(settings, name)!r}")


def differences(old: Settings, new: Settings) -> list[str]:
    """Name every setting on which two comparisons differ."""
    names = [field.name for field in fields(Settings) if getattr(old, field.name) != getattr(new, field.name)]
    return [f"{name.replace('_', '-')} was {getattr(old, name)!r}, now {getattr(new, name)!r}" for name in names]
