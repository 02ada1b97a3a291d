"""The arguments of a convolution, and the patches that its kernel sees at each position as rows of a matrix.

Rows have their channels last, so that they are copied in runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConvSpec:
    """The stride, padding and dilation of each dimension, the groups, and the shape of the weight."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shape: torch.Size

    def forward(self, x: Tensor, W: Tensor, k: int = 1, b: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x`` with ``W``, of ``k`` micro-batches side by side."""
        zero = [0] * len(self.stride)
        return torch.convolution(x, W, b, self.stride, self.padding, self.dilation, False, zero, k * self.groups)

    def backward(self, delta: Tensor, x: Tensor, W: Tensor, mask: list[bool], k: int = 1) -> Any:
        """Return the gradients of input and weight that ``mask`` asks for."""
        zero = [0] * len(self.stride)
        where = (self.stride, self.padding, self.dilation, False, zero, k * self.groups, [*mask, False])
        return torch.ops.aten.convolution_backward.default(delta, x, W, None, *where)

    def positions(self, size: Sequence[int]) -> list[int]:
        """Return the size of the output for that of an input."""
        dims = zip(size, self.padding, self.dilation, self.shape[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in dims]


def patches(x: Tensor, spec: ConvSpec) -> Tensor:
    """Return ``(inputs, C, *size)`` as ``(inputs, positions, kernel C)``."""
    padded = _padded(x.shape, x, spec)
    _inside(padded, spec).copy_(x.movedim(1, -1))
    first, *strides, channel = padded.stride()
    steps = [s * by for s, by in zip(strides, spec.stride, strict=True)]
    taps = [s * by for s, by in zip(strides, spec.dilation, strict=True)]
    shape = (x.shape[0], *spec.positions(x.shape[2:]), *spec.shape[2:], x.shape[1])
    seen = padded.as_strided(shape, (first, *steps, *taps, channel))
    return seen.reshape(x.shape[0], -1, spec.shape[1:].numel())


def from_patches(rows: Tensor, size: torch.Size, spec: ConvSpec) -> Tensor:
    """Apply the transpose of :func:`patches`: add every entry to where it was read; ``size`` is the shape of ``x``."""
    padded = _padded(size, rows, spec)
    rows = rows.reshape(rows.shape[0], *spec.positions(size[2:]), *spec.shape[2:], size[1])
    for tap, at in _taps(rows, spec):
        padded[at] += rows[tap]
    return _inside(padded, spec).movedim(-1, 1)


def _padded(size: torch.Size, like: Tensor, spec: ConvSpec) -> Tensor:
    sides = [length + 2 * p for length, p in zip(size[2:], spec.padding, strict=True)]
    return like.new_zeros(size[0], *sides, size[1])


def _inside(padded: Tensor, spec: ConvSpec) -> Tensor:
    return padded[
        (slice(None), *(slice(p, length - p) for p, length in zip(spec.padding, padded.shape[1:], strict=False)))
    ]


def _taps(rows: Tensor, spec: ConvSpec) -> Iterator[tuple[tuple[slice | int, ...], tuple[slice, ...]]]:
    """Yield, for every entry of the kernel, its place in ``rows`` and the part of the padded input that it reads."""
    whole = slice(None)
    positions = rows.shape[1 : 1 + len(spec.stride)]
    for tap in product(*map(range, spec.shape[2:])):
        ranges = zip(tap, spec.dilation, spec.stride, positions, strict=True)
        seen = [slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in ranges]
        yield (whole, *[whole] * len(positions), *tap), (whole, *seen)
