"""Data by name: how each source is read, in which folder it is looked for, and what to do where it is missing."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from steppe.lab.data import cifar, hub, idx, images, own, texts
from steppe.lab.data.raw import Constants, RawData
from steppe.lab.errors import LabError
from steppe.lab.settings import Settings

__all__ = ["SOURCES", "RawData", "Source", "augmentation", "find", "places", "read"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Source:
    """A kind of data in a folder.

    Args:
        read: from a folder and an image size to all examples.
        marks: a folder is taken when it holds one of these files or folders.
        hint: how to get the data, said when no folder holds them.
        place: where a system package puts them.
        augment: the usual augmentation of the training images.
    """

    read: Callable[[Path, int], RawData]
    marks: tuple[str, ...]
    hint: str
    place: Path | None = None
    augment: str = "none"


def _fashion(folder: Path, size: int) -> RawData:
    train, labels = idx.read_pair(folder, "train")
    test, test_labels = idx.read_pair(folder, "t10k")
    return RawData(train.unsqueeze(1), labels.long(), test.unsqueeze(1), test_labels.long(), int(test_labels.max()) + 1)


def _archive(read: Callable[[Path], RawData], constants: Constants, mark: str, augment: str) -> Source:
    """Return a source read from its authors' archive, unpacked, or from a folder that ``datasets`` has saved."""

    def either(folder: Path, size: int) -> RawData:
        return hub.read(folder, size, constants) if (folder / hub.MARK).exists() else read(folder)

    hint = "unpack the authors' archive, or a folder of datasets.save_to_disk, and name it with --data-dir"
    return Source(either, (mark, hub.MARK), hint, augment=augment)


_TREE = Source(images.read, ("train",), "name a folder with train/CLASS/ and val/CLASS/", augment="resized-crop-flip")
SOURCES: dict[str, Source] = {
    "fashion-mnist": Source(
        _fashion,
        ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"),
        "apt-get install dataset-fashion-mnist, or name a folder of idx files with --data-dir",
        FASHION_MNIST,
    ),
    "cifar10": _archive(cifar.cifar10, cifar.CIFAR10, "cifar-10-batches-py", "crop-flip"),
    "cifar100": _archive(cifar.cifar100, cifar.CIFAR100, "cifar-100-python", "crop-flip"),
    "svhn": _archive(cifar.svhn, cifar.SVHN, "train_32x32.mat", "crop"),
    "imagenet": _TREE,
    "image-folder": _TREE,
    "hf": Source(hub.read, (hub.MARK,), "save a set once with datasets: load_dataset(...).save_to_disk(DIR)"),
    "fortunes": Source(
        lambda folder, size: texts.fortunes(folder), texts.CLASSES[:1], "apt-get install fortunes", texts.FORTUNES
    ),
}


def read(settings: Settings) -> RawData:
    """Return all examples of the settings' source; the last source read is kept in memory.

    Raises:
        LabError: the source is unknown, no folder holds it, or a file in it cannot be read.
    """
    name = settings.data
    if name != "digits" and ":" not in name and name not in SOURCES:
        raise LabError(f"unknown data {name!r}; choose from {', '.join(['digits', *SOURCES])} or module:function")
    folder = find(name, settings.data_dir).resolve() if name in SOURCES else None
    return _read(name, folder, settings.image_size or images.SIDE)


@lru_cache(maxsize=1)
def _read(name: str, folder: Path | None, image_size: int) -> RawData:
    if folder is None:
        return _digits() if name == "digits" else own.read(name)
    return SOURCES[name].read(folder, image_size)


def augmentation(settings: Settings) -> str:
    """Return the augmentation of the training images."""
    if settings.augment != "auto":
        return settings.augment
    return SOURCES[settings.data].augment if settings.data in SOURCES else "none"


def _digits() -> RawData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32)
    return RawData(inputs, torch.tensor(labels, dtype=torch.int64), None, None, 10, scale=True)


def places(data: str, data_dir: str | None = None) -> list[Path]:
    """Return the folders where a source is looked for, in order: ``$STEPPE_DATA`` (else ./data), then the system's."""
    if data_dir is not None:
        return [Path(data_dir)]
    root = Path(os.environ.get("STEPPE_DATA", "data"))
    system = SOURCES[data].place
    return [root / data, root, *([] if system is None else [system])]


def find(data: str, data_dir: str | None = None) -> Path:
    """Return the first folder that holds the source."""
    looked, marks, hint = places(data, data_dir), SOURCES[data].marks, SOURCES[data].hint
    for folder in looked:
        if any((folder / mark).exists() for mark in marks):
            return folder
        if folder.name in marks and folder.is_dir():  # the archive's own folder was named
            return folder.parent
    if data_dir is not None and looked[0].is_dir():
        raise LabError(f"no {' or '.join(marks)} in {looked[0]}: {hint}")
    raise LabError(f"no {data} in {', '.join(map(str, looked))}: {hint}")
