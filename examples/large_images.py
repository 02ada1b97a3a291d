"""ImageNet in a folder and checkpoints of ``transformers``: data and models that are named as ``module:function``.

The studies of large images at scale "paper" name these functions. To run them, start in this folder:

    pip install pillow transformers
    steppe reproduce wsam_finetune --scale paper --data-dir /data/imagenet
    steppe reproduce rwsam_finetune --scale paper --data-dir /data/cifar
    steppe reproduce rwsam_classification --scale paper --study imagenet-resnet50 --data-dir /data/imagenet

:func:`imagenet` reads train/CLASS/* and val/CLASS/*. :func:`deit` and :func:`vit` read checkpoints that
``save_pretrained`` wrote into the folders deit-b16 and vit-b16 here. Nothing is downloaded. Change it for your data.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from steppe.lab import data
from steppe.lab.data import RawData
from steppe.lab.errors import LabError
from steppe.lab.inputs import Files

STORED = 256  # pixels of a side; crops of 224 are taken from these, as in ImageNet's usual evaluation
SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of each channel
HALF = ((0.5,) * 3, (0.5,) * 3)  # what ViT was pre-trained with


def imagenet(folder: str = "imagenet", side: int = STORED) -> RawData:
    """Return the images of train/ and val/, decoded when they are needed; classes are in the order of their names."""
    train = Path(folder) / "train"
    classes = sorted(path.name for path in train.iterdir() if path.is_dir()) if train.is_dir() else []
    if not classes:
        raise LabError(f"no class folders in {train}; name the folder above train/ and val/ with --data-dir")
    return RawData(
        *images(train, classes, side), *images(train.with_name("val"), classes, side), len(classes), IMAGENET
    )


def images(folder: Path, classes: list[str], side: int) -> tuple[Files, Tensor]:
    """Return the images in the class folders, and their labels."""
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise LabError(f"no images in the class folders of {folder}")
    files = Files(lambda i: opened(found[i][0], side), torch.arange(len(found)), (3, side, side))
    return files, torch.tensor([label for _, label in found])


def opened(path: Path, side: int) -> Tensor:
    """Decode an image, scale its shorter side to ``side``, and return its middle as bytes, shape (3, side, side)."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a JPEG much larger than needed is decoded at a fraction
            scale = side / min(image.size)
            width, height = (max(side, round(length * scale)) for length in image.size)
            scaled = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    except OSError as error:  # Pillow's errors are of this kind
        raise LabError(f"{path}: cannot read it: {error}") from None
    left, top = (width - side) // 2, (height - side) // 2
    middle = scaled.crop((left, top, left + side, top + side))
    return torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)


def cifar10(folder: str | None = None) -> RawData:
    """Return CIFAR-10, standardised as ViT was pre-trained."""
    return replace(data.SOURCES["cifar10"].read(data.find("cifar10", folder)), constants=HALF)


def cifar100(folder: str | None = None) -> RawData:
    """Return CIFAR-100, standardised as ViT was pre-trained."""
    return replace(data.SOURCES["cifar100"].read(data.find("cifar100", folder)), constants=HALF)


def deit(example: Tensor, classes: int) -> nn.Module:
    """Return DeiT-base with its ImageNet head."""
    return Classifier("deit-b16", classes)


def vit(example: Tensor, classes: int) -> nn.Module:
    """Return ViT-B/16 with a new head."""
    return Classifier("vit-b16", classes)


class Classifier(nn.Module):
    """A checkpoint that takes images and returns logits; its head is new if it has another number of classes."""

    def __init__(self, folder: str, classes: int) -> None:
        super().__init__()
        from transformers import AutoModelForImageClassification, logging

        logging.set_verbosity_error()  # a new head is meant
        if not (Path(folder) / "config.json").is_file():
            raise LabError(f"no config.json in {folder}: save a checkpoint there with save_pretrained")
        known = {"num_labels": classes, "ignore_mismatched_sizes": True, "local_files_only": True}
        self.inner = AutoModelForImageClassification.from_pretrained(folder, **known)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits, shape (n, classes)."""
        return self.inner(images).logits
