"""Where data come from: every source by name, the folder it lies in, and what to do where there is none."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from steppe.lab.data import cifar, files, hub, idx, own, texts
from steppe.lab.data.pool import Constants, Pool
from steppe.lab.settings import LabError, Settings

__all__ = ["SOURCES", "Pool", "Source", "find", "places", "read"]

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@dataclass(frozen=True)
class Source:
    """A kind of data in a folder.

    Args:
        read: (folder, image size) to its examples.
        marks: a folder is taken where it holds one of these.
        hint: what to do where no folder does.
        place: where a system's package puts it.
    """

    read: Callable[[Path, int], Pool]
    marks: tuple[str, ...]
    hint: str
    place: Path | None = None


def _either(read: Callable[[Path], Pool], constants: Constants) -> Callable[[Path, int], Pool]:
    """Read a folder of the authors' files, or one that `datasets` has saved."""
    return lambda folder, size: hub.read(folder, size, constants) if (folder / hub.MARK).exists() else read(folder)


def _fashion(folder: Path, size: int) -> Pool:
    train, labels = idx.read_pair(folder, "train")
    test, test_labels = idx.read_pair(folder, "t10k")
    return Pool(train.unsqueeze(1), labels.long(), test.unsqueeze(1), test_labels.long(), int(test_labels.max()) + 1)


_UNPACK = "unpack the authors' archive, or a folder of datasets.save_to_disk, and name it with --data-dir"
_TREE = "name a folder with train/CLASS/ and val/CLASS/ with --data-dir"
_IDX = ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte")
SOURCES: dict[str, Source] = {
    "fashion-mnist": Source(
        _fashion,
        _IDX,
        "apt-get install dataset-fashion-mnist, or name a folder of idx files with --data-dir",
        FASHION_MNIST,
    ),
    "cifar10": Source(
        _either(cifar.cifar10, cifar.CIFAR10), ("cifar-10-batches-py", "data_batch_1", hub.MARK), _UNPACK
    ),
    "cifar100": Source(_either(cifar.cifar100, cifar.CIFAR100), ("cifar-100-python", "train", hub.MARK), _UNPACK),
    "svhn": Source(_either(cifar.svhn, cifar.SVHN), ("train_32x32.mat", hub.MARK), _UNPACK),
    "imagenet": Source(files.read, ("train",), _TREE),
    "image-folder": Source(files.read, ("train",), _TREE),
    "hf": Source(hub.read, (hub.MARK,), "save a set once with datasets: load_dataset(...).save_to_disk(DIR)"),
    "fortunes": Source(
        lambda folder, size: texts.fortunes(folder), texts.CLASSES[:1], "apt-get install fortunes", texts.FORTUNES
    ),
}


def read(settings: Settings) -> Pool:
    """Return all examples of the settings' source, read once.

    Raises:
        LabError: no such source, no such folder, or a file in it that cannot be read.
    """
    return _read(settings.data, settings.data_dir, settings.image_size)


@lru_cache(maxsize=1)
def _read(data: str, data_dir: str | None, image_size: int) -> Pool:
    if data == "digits":
        return _digits()
    if ":" in data:
        return own.read(data)
    if data not in SOURCES:
        raise LabError(f"unknown data {data!r}; choose from {', '.join(['digits', *SOURCES])} or module:function")
    return SOURCES[data].read(find(data, data_dir), image_size)


def _digits() -> Pool:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32)
    return Pool(inputs, torch.tensor(labels, dtype=torch.int64), None, None, 10, scale=True)


def places(data: str, data_dir: str | None = None) -> list[Path]:
    """Return the folders where a source is looked for, in order: `$STEPPE_DATA` (else ./data), then the system's."""
    if data_dir is not None:
        return [Path(data_dir)]
    root = Path(os.environ.get("STEPPE_DATA", "data"))
    system = SOURCES[data].place
    return [root / data, root, *([] if system is None else [system])]


def find(data: str, data_dir: str | None = None) -> Path:
    """Return the first folder that holds the source."""
    looked = places(data, data_dir)
    for folder in looked:
        if any((folder / mark).exists() for mark in SOURCES[data].marks):
            return folder
    if data_dir is not None and looked[0].is_dir():
        raise LabError(f"no {' or '.join(SOURCES[data].marks)} in {looked[0]}: {SOURCES[data].hint}")
    raise LabError(f"no {data} in {', '.join(map(str, looked))}: {SOURCES[data].hint}")
