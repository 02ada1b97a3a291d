"""The task of a seed: its split, label noise and standardised examples."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe.lab import data
from steppe.lab.data.raw import RawData
from steppe.lab.errors import LabError
from steppe.lab.inputs import Examples, Files, Images, take
from steppe.lab.own import OwnTask
from steppe.lab.settings import Settings


@dataclass(frozen=True)
class Task:
    """Training and test examples of a run; training labels are noisy, test labels clean.

    ``own`` is the model, loss and metric that a user's task brings.
    """

    inputs: Examples
    labels: Tensor
    test_inputs: Examples
    test_labels: Tensor
    classes: int
    own: OwnTask | None = None

    def to(self, device: torch.device) -> "Task":
        """Return the task on a device; image files are decoded to it."""
        moved = (part.to(device) for part in (self.inputs, self.labels, self.test_inputs, self.test_labels))
        return Task(*moved, self.classes, self.own)  # type: ignore[call-arg, arg-type]


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return the random generator of a seed for one purpose; it does not depend on other draws."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def load(settings: Settings, seed: int) -> Task:
    """Return the task of one seed; its split and its label noise depend on the seed alone, not on the method."""
    _fits(settings)
    pool, size = data.read(settings), settings.train_size
    common = settings.test_seed if pool.test_labels is None else None  # of the split, for all seeds
    order = torch.randperm(len(pool.labels), generator=stream(seed if common is None else common, "split"))
    if pool.held and settings.validation:  # the last ones, which the task holds out itself
        order = torch.cat([order[order < size - pool.held], order[order >= size - pool.held]])
    train, test = order[:size], order[size:]
    if common is not None:
        train = train[torch.randperm(size, generator=stream(seed, "training"))]
    inputs, labels = take(pool.inputs, train), pool.labels[train]
    if pool.test_labels is None:
        test_inputs, test_labels = take(pool.inputs, test), pool.labels[test]
    else:
        test_inputs, test_labels = pool.test_inputs, pool.test_labels
    prepared = _prepared(pool, inputs, test_inputs, settings)
    redrawn = noisy(labels, settings.noise, pool.classes, seed)
    if settings.clean_validation:
        redrawn = torch.cat([redrawn[: settings.fitted], labels[settings.fitted :]])
    task = Task(prepared[0], redrawn, prepared[1], test_labels, pool.classes, pool.own)
    return held_out(task, settings.fitted) if settings.validation else task


def held_out(task: Task, fitted: int) -> Task:
    """Return a task that trains on the first ``fitted`` training examples and tests on the others.

    Training examples are in the seed's random order. The test set is left out.
    """
    kept, held = slice(fitted), slice(fitted, None)
    parts = take(task.inputs, held), task.labels[held]
    return Task(take(task.inputs, kept), task.labels[kept], *parts, task.classes, task.own)


def noisy(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Return labels, each redrawn with probability ``share`` uniformly from all classes (symmetric noise)."""
    if not share:
        return labels
    draw = stream(seed, "noise")
    chosen = torch.rand(len(labels), generator=draw) < share
    return torch.where(chosen, torch.randint(classes, (len(labels),), generator=draw), labels)


def offered(settings: Settings) -> int:
    """Return how many training examples the data have; at least one is left for the test."""
    pool = data.read(settings)
    return len(pool.labels) - (pool.test_labels is None)


def check(settings: Settings) -> None:
    """Raise a ``LabError`` if the data cannot be read or do not fit the settings, or a user's functions fail."""
    _fits(settings)
    if (own := data.read(settings).own) is not None:
        own.check()


def _fits(settings: Settings) -> None:
    """Raise a ``LabError`` if the data are too few, have no class numbers to redraw, or no images to augment."""
    found = offered(settings)
    if settings.train_size > found:
        raise LabError(f"train-size {settings.train_size} exceeds the {found} examples that {settings.data} offers")
    if found > settings.train_size and data.read(settings).held:
        raise LabError(f"{settings.data} brings its own validation examples; leave --train-size out")
    inputs = data.read(settings).inputs
    images = isinstance(inputs, Files) or (isinstance(inputs, Tensor) and inputs.dtype == torch.uint8)
    if settings.noise and not data.read(settings).classes:
        raise LabError(f"noise {settings.noise} redraws class numbers, and {settings.data} has none: set noise to 0")
    if data.augmentation(settings) != "none" and not images:
        raise LabError(f"augment {settings.augment} is for images, and {settings.data} has none")


def _prepared(pool: RawData, train: Any, test: Any, settings: Settings) -> tuple[Examples, Examples]:
    """Return training and test inputs that are standardised by the same numbers."""
    if pool.own is not None:
        return train, test
    if isinstance(train, Tensor) and train.is_floating_point():
        spread, mean = torch.std_mean(train) if pool.scale else (1.0, 0.0)
        return (train - mean) / spread, (test - mean) / spread
    mean, spread = _constants(pool, train, settings)
    return Images(train, mean, spread, settings.image_size), Images(test, mean, spread, settings.image_size)


def _constants(pool: RawData, train: Tensor | Files, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return mean and spread of the bytes: those of the data set, or measured ones."""
    if pool.constants is not None:
        mean, spread = (255 * torch.tensor(values).reshape(-1, 1, 1) for values in pool.constants)
        return mean, spread
    if isinstance(train, Files):
        raise LabError(f"{settings.data} has images in files and no mean and spread to standardise them by")
    if train.shape[1] == 1:
        spread, mean = torch.std_mean(train.float())
    else:
        spread, mean = torch.std_mean(train.float(), dim=(0, 2, 3), keepdim=True)
    return mean, spread
