"""Data to tensors: what one seed's run trains and tests on."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from steppe.lab import idx
from steppe.lab.settings import LabError, Settings

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Task:
    """A whole data set in memory; training labels already noisy, test labels clean."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int


def stream(seed: int, purpose: str) -> torch.Generator:
    """Return the random numbers that `seed` holds for one purpose, the same whatever else has drawn any."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def load(settings: Settings, seed: int) -> Task:
    """Return the task of one seed: its split and its label noise depend on the seed alone, never on the method."""
    inputs, test_inputs, labels, test_labels = _split(settings, seed)
    classes = int(test_labels.max()) + 1
    task = Task(inputs, noisy(labels, settings.noise, classes, seed), test_inputs, test_labels, classes)
    return held_out(task, settings.fitted) if settings.validation else task


def held_out(task: Task, fitted: int) -> Task:
    """Train on the first `fitted` training examples and put the others in the test set's place.

    Training examples come in the seed's random order. Those held out keep their noisy labels, because a search that
    may not see the test set has no clean ones either; the test set itself is left out.
    """
    parts = task.inputs[fitted:], task.labels[fitted:]
    return Task(task.inputs[:fitted], task.labels[:fitted], *parts, task.classes)


def noisy(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Redraw each label with probability `share`, uniformly from all classes (symmetric noise)."""
    draw = stream(seed, "noise")
    chosen = torch.rand(len(labels), generator=draw) < share
    return torch.where(chosen, torch.randint(classes, (len(labels),), generator=draw), labels)


def check(settings: Settings) -> None:
    """Raise a `LabError` where the data cannot be read or is smaller than what is asked for."""
    if settings.data not in ("digits", "fashion-mnist"):
        raise LabError(f"cannot read data {settings.data!r}; choose from digits, fashion-mnist")
    offered = len(_digits()[0]) - 1 if settings.data == "digits" else len(_images(_folder(settings))[0])
    if settings.train_size > offered:
        raise LabError(f"train-size {settings.train_size} exceeds the {offered} examples that {settings.data} offers")


def _split(settings: Settings, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(settings)
    size = settings.train_size
    if settings.data == "digits":
        inputs, labels = _digits()
        drawn_by = seed if settings.test_seed is None else settings.test_seed
        order = torch.randperm(len(labels), generator=stream(drawn_by, "split"))
        train, test = order[:size], order[size:]
        if settings.test_seed is not None:
            train = train[torch.randperm(size, generator=stream(seed, "training"))]
        return *_standardised(inputs[train], inputs[test]), labels[train], labels[test]
    inputs, labels, test_inputs, test_labels = _images(_folder(settings))
    train = torch.randperm(len(labels), generator=stream(seed, "split"))[:size]
    return *_standardised(inputs[train], test_inputs), labels[train], test_labels


def _standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Scale both by the training inputs' one mean and spread."""
    spread, mean = torch.std_mean(train)
    return (train - mean) / spread, (test - mean) / spread


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


def _folder(settings: Settings) -> Path:
    folder = Path(settings.data_dir) if settings.data_dir else FASHION_MNIST
    if not folder.is_dir():
        hint = "apt-get install dataset-fashion-mnist, or name a folder of idx files with --data-dir"
        raise LabError(f"no {settings.data} in {folder}: {hint}")
    return folder


@cache
def _images(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, labels = idx.read_pair(folder, "train")
    test, test_labels = idx.read_pair(folder, "t10k")
    return train.unsqueeze(1).float(), labels.long(), test.unsqueeze(1).float(), test_labels.long()
