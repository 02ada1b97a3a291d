"""Image folders as ImageNet has them: one folder a class in train/ and val/, decoded with Pillow when needed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.lab.data.raw import Constants, RawData
from steppe.lab.errors import LabError
from steppe.lab.inputs import Files

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDE = 224  # pixels that models see, where no other size is given
_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
_MARGIN = 256 / 224  # stored side to the side that models see, as in ImageNet's usual evaluation


def read(folder: Path, image_size: int) -> RawData:
    """Read ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg`` (or ``test/``); classes are numbered in order of name."""
    held_out = next((name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None:
        raise LabError(f"no val/ or test/ in {folder}")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if not classes:
        raise LabError(f"no class folders in {folder / 'train'}")
    parts = [_split(folder / name, classes, stored(image_size)) for name in ("train", held_out)]
    return RawData(*parts[0], *parts[1], len(classes), IMAGENET)


def _split(folder: Path, classes: list[str], side: int) -> tuple[Files, Tensor]:
    if strange := sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(classes)):
        raise LabError(f"{folder / strange[0]} is no class of train/")
    found = [
        (path, i)
        for i, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not found:
        raise LabError(f"no images in the class folders of {folder}")

    def opened(i: int) -> Tensor:
        from PIL import Image

        path, _ = found[i]
        try:
            with Image.open(path) as image:
                image.draft("RGB", (2 * side, 2 * side))  # a JPEG much larger than needed is decoded at a fraction
                return decoded(image, side)
        except OSError as error:  # Pillow's own errors are of this kind
            raise LabError(f"{path}: cannot read it: {error}") from None

    return lazy(opened, len(found), side), torch.tensor([label for _, label in found])


def lazy(read: Callable[[int], Tensor], count: int, side: int) -> Files:
    """Return ``count`` images of ``side`` x ``side`` that ``read`` decodes when needed."""
    return Files(read, torch.arange(count), (3, side, side))


def stored(image_size: int) -> int:
    """Return the side that images are kept with, so that crops of ``image_size`` have room."""
    return round(image_size * _MARGIN)


def decoded(image: "Image", side: int) -> Tensor:
    """Scale an image's shorter side to ``side`` and return its middle as bytes, shape (3, side, side)."""
    from PIL import Image

    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    scaled = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return pixels(scaled.crop((left, top, left + side, top + side)))


def pixels(image: "Image") -> Tensor:
    """Return an RGB image as bytes, shape (3, height, width)."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).permute(2, 0, 1).contiguous()
