"""Data by name: how each source is read, in which folder it is looked for, and what to do where it is missing."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from steppe.lab.data import cifar, idx
from steppe.lab.data.raw import RawData
from steppe.lab.errors import LabError, unknown
from steppe.lab.importing import called
from steppe.lab.inputs import joined
from steppe.lab.own import OwnTask, named
from steppe.lab.settings import Settings

__all__ = ["SOURCES", "RawData", "Source", "augmentation", "find", "places", "read"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Source:
    """A kind of data in a folder."""

    read: Callable[[Path], RawData]  # all examples in a folder
    marks: tuple[str, ...]  # a folder is taken when it holds one of these files or folders
    hint: str = "unpack the authors' archive and name its folder with --data-dir"  # said when no folder holds them
    place: Path | None = None  # where a system package puts them
    augment: str = "none"  # the usual augmentation of the training images


SOURCES = {
    "fashion-mnist": Source(
        idx.mnist,
        ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"),
        "apt-get install dataset-fashion-mnist, or name a folder of idx files with --data-dir",
        FASHION_MNIST,
    ),
    "cifar10": Source(cifar.cifar10, ("cifar-10-batches-py",), augment="crop-flip"),
    "cifar100": Source(cifar.cifar100, ("cifar-100-python",), augment="crop-flip"),
}


def read(settings: Settings) -> RawData:
    """Return all examples of the settings' source; the last source read is kept in memory.

    Raises:
        LabError: the source is unknown, no folder holds it, or a file in it cannot be read.
    """
    name, folder = settings.data, settings.data_dir
    if name != "digits" and ":" not in name and name not in SOURCES:
        raise unknown(f"unknown data {name!r}", name, ["digits", *SOURCES, "module:function"])
    return _read(name, str(find(name, folder).resolve()) if name in SOURCES else folder)


def forget() -> None:
    """Read again what is asked for next: a notebook's function may have changed."""
    _read.cache_clear()


@lru_cache(maxsize=1)
def _read(name: str, folder: str | None) -> RawData:
    if name in SOURCES and folder is not None:
        return SOURCES[name].read(Path(folder))
    return _digits() if name == "digits" else _own(name, folder)


def _digits() -> RawData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32)
    return RawData(inputs, torch.tensor(labels, dtype=torch.int64), None, None, 10, scale=True)


def _own(name: str, folder: str | None) -> RawData:
    """Call a user's function, with the folder if one is given.

    It returns an ``OwnTask`` or a dict of its fields, a ``RawData``, or four tensors: inputs, labels, test inputs, test
    labels. Float inputs of the four are used as they are. Images as bytes, shape (n, channels, height, width), are
    standardised by the mean and standard deviation of each channel of the training images.
    """
    made = called(name, *([] if folder is None else [folder]))
    if isinstance(made, RawData):
        return made
    if isinstance(made, dict | OwnTask):
        own = named(made, name)
        if own.validation is None:
            return RawData(*own.train, *own.test, own.classes, own=own)
        both = map(joined, own.train, own.validation)
        return RawData(*both, *own.test, own.classes, own=own, held=len(own.validation[1]))  # type: ignore[call-arg, misc]
    if not (isinstance(made, tuple) and len(made) == 4 and all(isinstance(part, Tensor) for part in made)):
        raise LabError(
            f"{name} must return a dict of train, test and model, or four tensors: inputs, labels, test_inputs, "
            f"test_labels, not {type(made).__name__}"
        )
    inputs, labels, test_inputs, test_labels = made
    if labels.is_floating_point() or labels.ndim != 1:
        raise LabError(f"{name}: labels must be whole numbers of shape (n,), not {labels.dtype} {tuple(labels.shape)}")
    if inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise LabError(f"{name}: inputs must be floats, or images as bytes, not {inputs.dtype}")
    classes = int(max(labels.max(), test_labels.max())) + 1
    return RawData(inputs, labels.long(), test_inputs, test_labels.long(), classes)


def augmentation(settings: Settings) -> str:
    """Return the augmentation of the training images."""
    if settings.augment != "auto":
        return settings.augment
    return SOURCES[settings.data].augment if settings.data in SOURCES else "none"


def places(data: str, data_dir: str | None = None) -> list[Path]:
    """Return the folders where a source is looked for, in order: ``$STEPPE_DATA`` (else ./data), then the system's."""
    if data_dir is not None:
        return [Path(data_dir)]
    root, system = Path(os.environ.get("STEPPE_DATA", "data")), SOURCES[data].place
    return [root / data, root, *([] if system is None else [system])]


def find(data: str, data_dir: str | None = None) -> Path:
    """Return the first folder that holds the source."""
    looked, source = places(data, data_dir), SOURCES[data]
    for folder in looked:
        if any((folder / mark).exists() for mark in source.marks):
            return folder
        if folder.name in source.marks and folder.is_dir():  # the archive's own folder was named
            return folder.parent
    what = " or ".join(source.marks) if data_dir is not None and looked[0].is_dir() else data
    raise LabError(f"no {what} in {', '.join(map(str, looked))}: {source.hint}")
