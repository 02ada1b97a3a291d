"""Folders that Hugging Face ``datasets`` has saved with ``save_to_disk``: images or texts with class labels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steppe.lab.data import images
from steppe.lab.data.raw import Constants, RawData, Texts
from steppe.lab.errors import LabError
from steppe.lab.inputs import Files

MARK = "dataset_dict.json"
_LABELS = ("label", "labels", "fine_label")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
_SMALL = 64  # pixels; sets of equal images up to this side are decoded once and kept in memory


def read(folder: Path, image_size: int, constants: Constants | None = None) -> RawData:
    """Read the splits ``train`` and ``test`` (or ``validation``, where the test labels are withheld)."""
    splits = _splits(folder)
    features = splits["train"].features
    label = next((name for name in _LABELS if hasattr(features.get(name), "num_classes")), None)
    if label is None:
        raise LabError(f"{folder}: none of its columns {', '.join(features)} holds class labels by a usual name")
    parts = [splits["train"], splits[_held_out(splits, label, folder)]]
    image = next((name for name, feature in features.items() if type(feature).__name__ == "Image"), None)
    inputs: list[Tensor | Files | Texts]
    if image is None:
        columns = _text_columns(features, folder)
        inputs = [list(zip(*(part[name][:] for name in columns), strict=True)) for part in parts]
    else:
        inputs = [_images(part, image, image_size) for part in parts]
        constants = constants or (images.IMAGENET if isinstance(inputs[0], Files) else None)
    labels = [torch.tensor(part[label][:]) for part in parts]
    return RawData(inputs[0], labels[0], inputs[1], labels[1], int(features[label].num_classes), constants)


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


def _text_columns(features: Any, folder: Path) -> tuple[str, ...]:
    for pair in _PAIRS:
        if set(pair) <= set(features):
            return pair
    for name in ("sentence", "text", *features):
        if getattr(features.get(name), "dtype", "") == "string":
            return (name,)
    raise LabError(f"{folder}: no column of images or texts among {', '.join(features)}")


def _images(split: Any, column: str, image_size: int) -> Tensor | Files:
    first = split[0][column]
    if first.size[0] == first.size[1] <= _SMALL:
        decoded = [images.pixels(row[column].convert("RGB")) for row in split]
        if len({image.shape for image in decoded}) == 1:
            return torch.stack(decoded)
    side = images.stored(image_size)
    return images.lazy(lambda i: images.decoded(split[i][column], side), len(split), side)
