"""Augmentation of training images, on their device, a batch at a time.

:func:`draw` draws a few numbers for each example from a seeded generator, and :func:`apply` is a pure function of
images and numbers. So a batch can be made again bit for bit, and several processes that share a batch make the same
images as one process.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

PAD = 4  # pixels of black on each side before a crop, as in the papers' "basic augmentation"
_AREA, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def draw(name: str, count: int, shape: tuple[int, int], stream: torch.Generator) -> dict[str, Tensor]:
    """Return the random numbers of ``count`` examples of (height, width), each of shape (count,).

    crop: a corner within the padded image. flip: one bit. resized-crop: a box of 8 to 100 % of the area with a ratio of
    3/4 to 4/3 (the first of ten that fits, else the whole image), as Inception's authors and torchvision do.
    """
    found: dict[str, Tensor] = {}
    if name.startswith("crop"):
        found["top"] = torch.randint(2 * PAD + 1, (count,), generator=stream)
        found["left"] = torch.randint(2 * PAD + 1, (count,), generator=stream)
    if name.startswith("resized-crop"):
        found |= _boxes(count, shape, stream)
    if name.endswith("flip"):
        found["flip"] = torch.rand(count, generator=stream) < 0.5
    return found


def apply(images: Tensor, change: dict[str, Tensor], side: int | None = None) -> Tensor:
    """Return the images changed by the drawn numbers; ``side`` is the side of resized crops."""
    change = {name: values.to(images.device) for name, values in change.items()}
    if "top" in change:
        images = crop(images, change["top"], change["left"])
    if "box_top" in change:
        box = torch.stack([change[f"box_{part}"] for part in ("top", "left", "height", "width")], 1)
        images = resized_crop(images, box, side or images.shape[-1])
    if "flip" in change:
        images = torch.where(change["flip"][:, None, None, None], images.flip(3), images)
    return images


def crop(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Return each image padded by black and cropped to its size at (top, left)."""
    padded = functional.pad(images, (PAD, PAD, PAD, PAD))
    height, width = images.shape[2:]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of the crops at all corners
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def resized_crop(images: Tensor, box: Tensor, side: int) -> Tensor:
    """Return the box (top, left, height, width; shape (n, 4), in pixels) of each image, bilinear, side x side."""
    height, width = images.shape[-2:]
    steps = (torch.arange(side, device=images.device) + 0.5) / side
    ys = (box[:, 0:1] + box[:, 2:3] * steps) / height * 2 - 1
    xs = (box[:, 1:2] + box[:, 3:4] * steps) / width * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(xs[:, None, :], ys[:, :, None]), 3)
    return functional.grid_sample(images.float(), grid.float(), padding_mode="border", align_corners=False)


def _boxes(count: int, shape: tuple[int, int], stream: torch.Generator) -> dict[str, Tensor]:
    height, width = shape
    random = torch.rand(count, _TRIES, 4, generator=stream)
    area = height * width * (_AREA[0] + (_AREA[1] - _AREA[0]) * random[..., 0])
    low, high = map(math.log, _RATIO)
    ratio = torch.exp(low + (high - low) * random[..., 1])
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (w <= width) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)
    none = ~fits.any(1)

    def chosen(values: Tensor, instead: float) -> Tensor:
        return values.gather(1, first).squeeze(1).masked_fill(none, instead)

    h, w = chosen(h, height), chosen(w, width)
    top, left = chosen(random[..., 2], 0.0) * (height - h), chosen(random[..., 3], 0.0) * (width - w)
    return {"box_top": top, "box_left": left, "box_height": h, "box_width": w}
