"""What a comparison holds fixed: every method and every seed is trained under one `Settings` value."""

import math
from dataclasses import asdict, dataclass, fields, replace


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


@dataclass(frozen=True)
class Preset:
    """What `steppe compare` does when it is told no more than the data."""

    settings: Settings
    methods: tuple[str, ...]
    seeds: int


_DIGITS = Settings()
_FASHION = Settings(data="fashion-mnist", train_size=2000, model="cnn-32", epochs=60)
_DIGITS_METHODS = (
    "SGD",
    "SGD(epochs=2x)",
    "SAM(rho=0.2)",
    "SAM(rho=0.5)",
    "WSAM(rho=0.5, gamma=0.9)",
    "SAM(rho=0.2, m=64)",
    "SAM(rho=0.2, m=32)",
    "SAM(rho=0.2, m=16)",
    "SAM(rho=0.2, m=8)",
    "RWSAM(rho=0.5)",
)
_QUICK_METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.2)", "SAM(rho=0.5)", "SAM(rho=0.2, m=8)")
_FASHION_METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.05)", "SAM(rho=0.1)", "SAM(rho=0.05, m=32)")
_FASHION_QUICK = replace(_FASHION, train_size=1000, model="cnn-16", epochs=10, lr=0.1)

PRESETS: dict[tuple[str, bool], Preset] = {
    ("digits", False): Preset(_DIGITS, _DIGITS_METHODS, 5),
    ("digits", True): Preset(replace(_DIGITS, model="mlp-128-128", train_size=600, epochs=80), _QUICK_METHODS, 3),
    ("fashion-mnist", False): Preset(_FASHION, _FASHION_METHODS, 3),
    ("fashion-mnist", True): Preset(_FASHION_QUICK, ("SGD", "SAM(rho=0.05)"), 2),
}


def preset(data: str, quick: bool) -> Preset:
    """Return the defaults for a data source, the tiny ones when `quick`."""
    if (data, quick) not in PRESETS:
        known = ", ".join(sorted({name for name, _ in PRESETS}))
        raise LabError(f"unknown data {data!r}; choose from {known}")
    return PRESETS[data, quick]


def differences(old: Settings, new: Settings) -> list[str]:
    """Name every setting on which two comparisons differ."""
    names = [field.name for field in fields(Settings) if getattr(old, field.name) != getattr(new, field.name)]
    return [f"{name.replace('_', '-')} was {getattr(old, name)!r}, now {getattr(new, name)!r}" for name in names]
