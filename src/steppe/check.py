"""Arguments are checked before anything is changed; every error names the argument and what was expected."""

import math
import operator
from numbers import Real

import torch


def number(name: str, value: float, expected: str, *, low: float = 0.0, below: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``low <= value < below``; ``TypeError`` if ``value`` is no real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not low <= value < below:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 <= value <= 1``."""
    number(name, value, "a number in [0, 1]", below=math.nextafter(1.0, 2.0))


def positive_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 < value <= 1``."""
    number(name, value, "a number in (0, 1]", low=math.nextafter(0.0, 1.0), below=math.nextafter(1.0, 2.0))


def non_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 <= value < inf``."""
    number(name, value, "a finite number >= 0")


def positive_integer(name: str, value: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer above 0."""
    try:
        integer = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = 0
    if integer < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def grad_scaler(scaler: object) -> None:
    """Raise ``TypeError`` unless ``scaler`` is ``None`` or a ``torch.amp.GradScaler``."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
