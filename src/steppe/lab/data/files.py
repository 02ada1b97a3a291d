"""Image folders: ImageNet's tree, one folder a class in train/ and val/, decoded with Pillow when needed."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.lab.data.pool import Constants, Pool
from steppe.lab.inputs import Files
from steppe.lab.settings import LabError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET: Constants = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SUFFIXES = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
SIDE = 224  # pixels that models see, where nothing else is asked for
_MARGIN = 256 / 224  # stored side to the side that models see, as in ImageNet's usual evaluation


def read(folder: Path, image_size: int) -> Pool:
    """Read a tree `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `test/`); classes are numbered in order of name."""
    held_out = next((name for name in ("val", "test") if (folder / name).is_dir()), None)
    if held_out is None:
        raise LabError(f"no val/ or test/ in {folder}")
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if not classes:
        raise LabError(f"no class folders in {folder / 'train'}")
    train, labels = _listed(folder / "train", classes)
    test, test_labels = _listed(folder / held_out, classes)
    side = stored(image_size)
    return Pool(lazy(train, side), labels, lazy(test, side), test_labels, len(classes), IMAGENET)


def _listed(folder: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    if strange := sorted({path.name for path in folder.iterdir() if path.is_dir()} - set(classes)):
        raise LabError(f"{folder / strange[0]} is no class of train/")
    found = [(path, i) for i, name in enumerate(classes) for path in _images(folder / name)]
    if not found:
        raise LabError(f"no images in the class folders of {folder}")
    return [path for path, _ in found], torch.tensor([label for _, label in found])


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES) if folder.is_dir() else []


def lazy(paths: list[Path], side: int) -> Files:
    """Return the files as images of `side` x `side`, decoded when needed."""

    def opened(i: int) -> Tensor:
        from PIL import Image

        try:
            with Image.open(paths[i]) as image:
                image.draft("RGB", (2 * side, 2 * side))  # a JPEG much larger than needed is decoded at a fraction
                return decoded(image, side)
        except OSError as error:  # Pillow's own errors are of this kind
            raise LabError(f"{paths[i]}: cannot read it: {error}") from None

    return of(opened, len(paths), side)


def of(read: Callable[[int], Tensor], count: int, side: int) -> Files:
    """Return `count` images of `side` x `side` that `read` decodes."""
    return Files(read, torch.arange(count), (3, side, side))


def stored(image_size: int) -> int:
    """Return the side that images are kept with, so that crops of `image_size` have room."""
    return round(image_size * _MARGIN)


def decoded(image: "Image", side: int) -> Tensor:
    """Return an image's shorter side scaled to `side` and its middle as bytes, shape (3, side, side)."""
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
