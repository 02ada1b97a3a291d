"""Sets of examples that are prepared when they are indexed: bytes are standardised, image files decoded.

Each is indexed like a tensor, by row numbers or slices, and returns what a model takes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from os import cpu_count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from steppe.lab.errors import LabError, one_line

_AHEAD = 3  # batches that are decoded before they are needed


@dataclass(frozen=True)
class Files:
    """Images in files, decoded when indexed; ``read(i)`` gives the i-th as bytes, shape (channels, side, side)."""

    read: Callable[[int], Tensor]
    rows: Tensor
    shape_of_one: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        chosen = self.rows[rows].tolist()
        return torch.stack(list(_threads().map(self.read, chosen)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape that a tensor of all images would have."""
        return (len(self), *self.shape_of_one)

    def take(self, rows: Tensor | slice) -> "Files":
        """Return the chosen examples as a set, not decoded."""
        return replace(self, rows=self.rows[rows])


@dataclass(frozen=True)
class Images:
    """Images as bytes, shape (n, channels, height, width); indexing returns ``(bytes - mean) / spread`` in float32.

    Larger images than ``side`` are cropped at the centre, smaller ones scaled up.
    """

    pixels: Tensor | Files
    mean: Tensor  # of the bytes, in 0 to 255: one number, or one for each channel
    spread: Tensor  # their standard deviation, likewise
    side: int | None = None
    device: torch.device = torch.device("cpu")  # of the returned images

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        if isinstance(rows, int):
            return self[slice(rows, rows + 1)][0]
        return self.finish(self.raw(rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape that a tensor of all images would have."""
        n, channels, height, width = self.pixels.shape
        return (n, channels, self.side or height, self.side or width)

    def raw(self, rows: Tensor | slice) -> Tensor:
        """Return the chosen images as bytes."""
        if isinstance(rows, Tensor) and isinstance(self.pixels, Tensor):
            rows = rows.to(self.pixels.device)
        return self.pixels[rows].to(self.device, non_blocking=True)

    def finish(self, raw: Tensor) -> Tensor:
        """Return standardised images of bytes."""
        own = raw.shape[-1]
        side = self.side or own
        if own > side:
            edge = (own - side) // 2
            raw = raw[..., edge : edge + side, edge : edge + side]
        standard = (raw.float() - self.mean) / self.spread
        return functional.interpolate(standard, (side, side), mode="bilinear") if own < side else standard

    def take(self, rows: Tensor | slice) -> "Images":
        """Return the chosen images as a set."""
        return replace(self, pixels=take(self.pixels, rows))

    def to(self, device: torch.device) -> "Images":
        """Return the set for a device; images in memory are moved there."""
        pixels = self.pixels.to(device) if isinstance(self.pixels, Tensor) else self.pixels
        return Images(pixels, self.mean.to(device), self.spread.to(device), self.side, device)


@dataclass(frozen=True)
class Fields:
    """Several tensors of one set by name; indexing returns the dict of their rows."""

    parts: dict[str, Tensor]

    @classmethod
    def of(cls, parts: dict[str, Any]) -> "Fields":
        """Return a set of tensors of one length.

        Raises:
            LabError: a part is no tensor, or lengths differ.
        """
        if not parts or not all(isinstance(part, Tensor) for part in parts.values()):
            raise LabError("a dict of inputs must hold tensors")
        if len({len(part) for part in parts.values()}) > 1:
            raise LabError(f"a dict of inputs has {', '.join(f'{len(p)} {name}' for name, p in parts.items())}")
        return cls(parts)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, rows: Any) -> dict[str, Tensor]:
        return self.take(rows).parts

    def take(self, rows: Any) -> "Fields":
        """Return the chosen rows as a set."""
        return Fields({name: part[rows] for name, part in self.parts.items()})

    def to(self, device: torch.device) -> "Fields":
        """Return the set on a device."""
        return Fields({name: part.to(device) for name, part in self.parts.items()})


Examples = Tensor | Images | Fields


def joined(first: Any, second: Any) -> Any:
    """Return two sets of tensors as one.

    Raises:
        LabError: they do not fit together.
    """
    try:
        if isinstance(first, Fields):
            return Fields({name: torch.cat([part, second.parts[name]]) for name, part in first.parts.items()})
        return torch.cat([first, second])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise LabError(f"a task's validation does not fit its train: {one_line(error)}") from error


def take(examples: Any, rows: Tensor | slice) -> Any:
    """Return the chosen rows as a set of the same kind."""
    return examples[rows] if isinstance(examples, Tensor) else examples.take(rows)


def raw(examples: Examples, rows: Tensor) -> Any:
    """Return the chosen rows as they are before augmentation: bytes for images."""
    return examples.raw(rows) if isinstance(examples, Images) else examples[rows]


def finish(examples: Examples, raw: Any) -> Any:
    """Return what a model takes, of raw rows that may have been augmented."""
    return examples.finish(raw) if isinstance(examples, Images) else raw


def ahead(make: Callable[[Tensor], Any], rows: Iterator[Tensor], examples: Examples) -> Iterator[tuple[Tensor, Any]]:
    """Yield ``(rows, make(rows))``; batches of image files are made by a thread while earlier ones are in use."""
    if not (isinstance(examples, Images) and isinstance(examples.pixels, Files)):
        yield from ((each, make(each)) for each in rows)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[Tensor, Future[Any]]] = [(r, pool.submit(make, r)) for r in islice(rows, _AHEAD)]
        try:
            while waiting:
                each, future = waiting.pop(0)
                waiting += [(r, pool.submit(make, r)) for r in islice(rows, 1)]
                yield each, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads that decode; Pillow releases Python's lock while it decodes."""
    return ThreadPoolExecutor(cpu_count() or 1)
