"""The settings of a comparison: every method and every seed is trained under one ``Settings`` value."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from typing import Any, NamedTuple

from steppe.lab.errors import LabError

OPTIMIZERS = ("sgd", "adamw")
AUGMENTATIONS = ("auto", "none", "crop", "crop-flip", "resized-crop-flip")


class _Check(NamedTuple):
    expected: str
    holds: Callable[[Any], bool]


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(known: tuple[str, ...]) -> _Check:
    return _Check(f"one of {', '.join(known)}", known.__contains__)


_ANY = _Check("anything", lambda value: True)
_COUNT = _Check("a positive integer", lambda value: _is_number(value, int) and value > 0)
_SHARE = _Check("a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1)
_BELOW_ONE = _Check("a share of at least 0 and less than 1", lambda value: _is_number(value) and 0 <= value < 1)
_POSITIVE = _Check("a positive number", lambda value: _is_number(value) and 0 < value < math.inf)
_FINITE = _Check("a finite number >= 0", lambda value: _is_number(value) and 0 <= value < math.inf)
_STEPS = _Check("a number of steps >= 0", _FINITE.holds)
_SIDE = _Check("a positive integer", lambda value: value is None or _COUNT.holds(value))


def _setting(default: Any, check: _Check = _ANY, option: str = "", compare: bool = True) -> Any:
    """Return a field; ``option`` is the help of its command-line option, empty for a setting without one."""
    return field(default=default, metadata={"check": check, "option": option}, compare=compare)


@dataclass(frozen=True)
class Settings:
    """Data, model and schedule that every run of a comparison shares.

    Raises:
        LabError: a value that no run can use.
    """

    data: str = "digits"
    data_dir: str | None = _setting(None, option="Folder that holds the data.", compare=False)  # of this machine alone
    train_size: int = _setting(1000, _COUNT, "Training examples, drawn anew for each seed.")
    noise: float = _setting(0.4, _SHARE, "Share of training labels redrawn uniformly from all classes.")
    model: str = _setting(
        "mlp-256-256", option="mlp-256-256, cnn-32, resnet18-gn, wrn28-10, vit-s4 or module:function."
    )
    epochs: int = _setting(150, _COUNT, "Passes over the training data, unless a method sets its own.")
    batch_size: int = _setting(128, _COUNT, "Examples in a batch, over all processes.")
    lr: float = _setting(0.05, _POSITIVE, "Learning rate after the warm-up; cosine to 0. With adamw 0.001.")
    momentum: float = _setting(0.9, _FINITE, "SGD's momentum.")
    weight_decay: float = _setting(5e-4, _FINITE, "The base optimizer's weight decay.")
    optimizer: str = _setting("sgd", _one_of(OPTIMIZERS), "The base of the methods: sgd or adamw.")
    warmup: int = _setting(0, _STEPS, "Steps of a linear warm-up.")
    label_smoothing: float = _setting(0.0, _BELOW_ONE, "Share of the target spread over all classes.")
    augment: str = _setting("auto", _one_of(AUGMENTATIONS), f"{', '.join(AUGMENTATIONS)}; auto: usual for the data.")
    image_size: int | None = _setting(None, _SIDE, "Side of images in pixels; else as in the data.")
    validation: float = _setting(0.0, _BELOW_ONE)  # share of the training examples held out and tested on
    clean_validation: bool = False  # whether the labels held out stay clean under label noise
    test_seed: int | None = None  # draws the digits' test set, the same for all seeds; None: each seed draws one
    start: str | None = None  # initial weights: a method trained first, SGD(epochs=50), or a file x.pt
    start_lr: float = _setting(0.05, _POSITIVE)  # of the method in start

    def __post_init__(self) -> None:
        for one in fields(self):
            check, value = one.metadata.get("check", _ANY), getattr(self, one.name)
            if not check.holds(value):
                raise LabError(f"{one.name.replace('_', '-')} must be {check.expected}, got {value!r}")
        if self.data == "digits" and self.data_dir is not None:
            raise LabError("digits come with scikit-learn; data-dir goes with --data fashion-mnist")
        if self.batch_size > self.fitted:
            held = f" beside the {self.train_size - self.fitted} for validation" if self.validation else ""
            raise LabError(
                f"batch-size {self.batch_size} exceeds the {self.fitted} training examples{held}: no full batch fits"
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
        """Return plain data for JSON, without the folder of the data: records hold no paths of this machine."""
        return asdict(self) | {"data_dir": None}
