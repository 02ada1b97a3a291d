"""What a convolution's kernel sees at each position, as rows of a matrix: channels last, which are copied in runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from steppe.factored.spec import Spec


def patches(x: Tensor, spec: Spec) -> Tensor:
    """``(inputs, C, *size)`` as ``(inputs, positions, kernel C)``."""
    padded = _padded(x.shape, x, spec)
    _inside(padded, spec).copy_(x.movedim(1, -1))
    first, *strides, channel = padded.stride()
    steps = [s * by for s, by in zip(strides, spec.stride, strict=True)]
    taps = [s * by for s, by in zip(strides, spec.dilation, strict=True)]
    shape = (len(x), *spec.positions(x.shape[2:]), *spec.shape[2:], x.shape[1])
    seen = padded.as_strided(shape, (first, *steps, *taps, channel))
    return seen.reshape(len(x), -1, spec.shape[1:].numel())


def from_patches(rows: Tensor, size: torch.Size, spec: Spec) -> Tensor:
    """The transpose of :func:`patches`: every entry goes back to where it was seen; ``size`` is that of ``x``."""
    padded = _padded(size, rows, spec)
    rows = rows.reshape(len(rows), *spec.positions(size[2:]), *spec.shape[2:], size[1])
    for tap, at in _taps(rows, spec):
        padded[at] += rows[tap]
    return _inside(padded, spec).movedim(-1, 1)


def _padded(size: torch.Size, like: Tensor, spec: Spec) -> Tensor:
    sides = [length + 2 * p for length, p in zip(size[2:], spec.padding, strict=True)]
    return like.new_zeros(size[0], *sides, size[1])


def _inside(padded: Tensor, spec: Spec) -> Tensor:
    return padded[
        (slice(None), *(slice(p, length - p) for p, length in zip(spec.padding, padded.shape[1:], strict=False)))
    ]


def _taps(rows: Tensor, spec: Spec) -> Iterator[tuple[tuple[slice | int, ...], tuple[slice, ...]]]:
    """For every entry of the kernel: where it is in ``rows``, and what it saw of the padded input."""
    whole = slice(None)
    positions = rows.shape[1 : 1 + len(spec.stride)]
    for tap in product(*map(range, spec.shape[2:])):
        ranges = zip(tap, spec.dilation, spec.stride, positions, strict=True)
        seen = [slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in ranges]
        yield (whole, *[whole] * len(positions), *tap), (whole, *seen)
