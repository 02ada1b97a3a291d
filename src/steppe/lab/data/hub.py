"""Folders that Hugging Face `datasets` has saved with `save_to_disk`: images or texts with class labels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppe.lab.data import files
from steppe.lab.data.pool import Constants, Pool
from steppe.lab.inputs import Files
from steppe.lab.settings import LabError

MARK = "dataset_dict.json"
_LABELS = ("label", "labels", "fine_label")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
_SMALL = 64  # pixels; sets of equal images up to this side are decoded once and kept in memory


def read(folder: Path, image_size: int, constants: Constants | None = None) -> Pool:
    """Read the splits `train` and `test` (or `validation`, where the test labels are withheld)."""
    splits = _splits(folder)
    features = splits["train"].features
    label = next((name for name in _LABELS if hasattr(features.get(name), "num_classes")), None)
    if label is None:
        raise LabError(f"{folder}: none of its columns {', '.join(features)} holds class labels by a usual name")
    held_out = _held_out(splits, label, folder)
    classes = int(features[label].num_classes)
    train, test = splits["train"], splits[held_out]
    labels, test_labels = torch.tensor(train[label][:]), torch.tensor(test[label][:])
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if not images:
        columns = _texts(list(features), features, folder)
        return Pool(_rows(train, columns), labels, _rows(test, columns), test_labels, classes)
    inputs, test_inputs = (_images(split, images[0], image_size) for split in (train, test))
    known = files.IMAGENET if isinstance(inputs, Files) and constants is None else constants
    return Pool(inputs, labels, test_inputs, test_labels, classes, known)


def _splits(folder: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise LabError(f'{folder} needs the package datasets ({error}): pip install "steppe[hub]"') from None
    try:
        splits = load_from_disk(str(folder))
    except Exception as error:  # damaged folders raise nearly anything
        reason = str(error).partition("\n")[0]
        raise LabError(f"{folder}: cannot read it: {type(error).__name__}: {reason}") from None
    if "train" not in splits:
        raise LabError(f"{folder}: no split 'train' among {', '.join(splits)}")
    return splits


def _held_out(splits: Any, label: str, folder: Path) -> str:
    for name in ("test", "validation", "validation_matched"):
        if name in splits and min(splits[name][label][:], default=-1) >= 0:  # GLUE withholds test labels: all are -1
            return name
    raise LabError(f"{folder}: no split 'test' or 'validation' with labels")


def _texts(names: list[str], features: Any, folder: Path) -> tuple[str, ...]:
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    single = next((n for n in ("sentence", "text", *names) if getattr(features.get(n), "dtype", "") == "string"), None)
    if pair is None and single is None:
        raise LabError(f"{folder}: no column of images or texts among {', '.join(names)}")
    return pair or (str(single),)


def _rows(split: Any, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    return list(zip(*(split[name][:] for name in columns), strict=True))


def _images(split: Any, column: str, image_size: int) -> Tensor | Files:
    first = split[0][column]
    if first.size[0] == first.size[1] <= _SMALL:
        decoded = [files.pixels(row[column].convert("RGB")) for row in split]
        if len({image.shape for image in decoded}) == 1:
            return torch.stack(decoded)
    side = files.stored(image_size)
    return files.of(lambda i: files.decoded(split[i][column], side), len(split), side)
