"""Layers as bilinear maps ``y = B(x, W)``: a matrix product, a convolution, a lookup.

A map is applied, and its gradients are taken, with the weights ``P_k`` of each micro-batch, ``(k, height, width)``. One
``W`` for the whole batch is the case of one micro-batch. The gradient of ``W`` for micro-batch ``k`` is a product
``G_k = left_k^T right_k`` over the rows of its examples, and ``factors`` returns both sides. For ``y = x W^T``,
``left`` is the gradient of the output, and ``right`` is the input. A map that is ``turned`` has ``y = x W``, and the
sides exchanged. An integer tensor of indices stands for one-hot rows.

Tensors by example are ``(n, q, ...)``, those by micro-batch ``(k, rows, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

Times = Callable[[Tensor, Tensor], None]  # (y, x): adds a product with the rows of x to the rows of y, in place


@dataclass(frozen=True)
class Dense:
    """``y = x W^T + b``; ``turned``, ``y = x W + b``."""

    turned: bool = False

    def apply(self, x: Tensor, P: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the output for ``x``, ``(k, rows, width)``, with ``b`` of ``(k, height)``."""
        P = P if self.turned else P.mT
        return torch.bmm(x, P) if b is None else torch.baddbmm(b[:, None], x, P)

    def input_gradient(self, d: Tensor, x: Tensor, P: Tensor) -> Tensor:
        """Return the gradient of the input."""
        return torch.bmm(d, P.mT if self.turned else P)

    def gradients(self, d: Tensor, x: Tensor) -> Tensor:
        """Return the gradients of the weights, ``(k, height, width)``."""
        left, right = self.factors(x, d)
        return torch.bmm(left.mT, right)

    def factors(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return left and right, ``(n, rows, height)`` and ``(n, rows, width)``."""
        return (x, d) if self.turned else (d, x)

    def shape(self, x: Tensor, d: Tensor) -> tuple[int, int, int]:
        """Return the rows of an example, and height and width of ``W``."""
        left, right = self.factors(x, d)
        return left.shape[1], left.shape[2], right.shape[2]

    def add_output(self, y: Tensor, x: Tensor, times: Times) -> None:
        """Add ``times`` the rows of ``x`` to those of ``y``."""
        times(y, x)

    def add_input_gradient(self, dx: Tensor, d: Tensor, times: Times) -> None:
        """Add ``times`` the rows of the output's gradient to those of the input's."""
        times(dx, d)


@dataclass(frozen=True)
class Conv:
    """``y = conv(x, W) + b`` in one, two or three dimensions; micro-batches are groups of one convolution.

    Its rows are the positions of the output, and at each the patch of the input that the kernel sees, channels last: so
    it is copied in runs. ``weight`` is the shape of ``W``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    weight: torch.Size
    turned = False

    def apply(self, x: Tensor, P: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the output for ``x``, ``(k, inputs, C, ...)``, with ``b`` of ``(k, height)``."""
        k, bias = x.shape[0], None if b is None else b.flatten()
        return apart(torch.convolution(side_by_side(x), self._below(P), bias, *self._options(k)), k)

    def input_gradient(self, d: Tensor, x: Tensor, P: Tensor) -> Tensor:
        """Return the gradient of the input."""
        k, inputs, channels, *size = x.shape
        like = x.new_empty(inputs, k * channels, *size)  # for its shape alone
        return apart(self._backward(side_by_side(d), like, self._below(P), k, [True, False, False])[0], k)

    def gradients(self, d: Tensor, x: Tensor) -> Tensor:
        """Return the gradients of the weights, ``(k, height, width)``."""
        k, (height, *rest) = x.shape[0], self.weight
        like = d.new_empty(k * height, *rest)  # for its shape alone
        made: Tensor = self._backward(side_by_side(d), side_by_side(x), like, k, [False, True, False])[1]
        return made.reshape(k, height, -1)

    def _backward(self, d: Tensor, x: Tensor, W: Tensor, k: int, mask: list[bool]) -> Any:
        return torch.ops.aten.convolution_backward.default(d, x, W, None, *self._options(k), mask)

    def _options(self, k: int) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), k * self.groups

    def block(self, x: Tensor, m: int) -> int | None:
        """Return how many micro-batches share a call, as a group each: all on an accelerator.

        On a CPU, as many as have 32 examples and 4 MiB of weights: smaller calls waste time, and larger ones memory.
        Groups of few channels are slow there: up to 16 micro-batches that are large, as those of a first layer, have a
        call each. This saves 2 % of a step of a ResNet.
        """
        if x.device.type != "cpu":
            return None
        rows = m * x.shape[3:].numel() // prod(self.stride)
        if self.groups == 1 and self.weight[1] < 8 and rows >= 1024 and x.shape[0] <= 16 * m:
            return 1
        return max(1, min(32 // m, (4 << 20) // (self.weight.numel() * x.element_size())))

    def _below(self, P: Tensor) -> Tensor:
        return P.reshape(-1, *self.weight[1:])

    def factors(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output's gradient by position, and the patch of the input at each position."""
        return self._by_position(d), self._patches(x)

    def shape(self, x: Tensor, d: Tensor) -> tuple[int, int, int]:
        """Return the positions of an example, and height and width of ``W``."""
        return d.shape[1] * d.shape[3:].numel(), self.weight[0], self.weight[1:].numel()

    def add_output(self, y: Tensor, x: Tensor, times: Times) -> None:
        """Add ``times`` the patches of ``x`` to the positions of ``y``."""
        rows = y.new_zeros(y.shape[0], y.shape[1] * y.shape[3:].numel(), y.shape[2])
        times(rows, self._patches(x))
        y += rows.reshape(*y.shape[:2], -1, y.shape[2]).mT.reshape(y.shape)

    def add_input_gradient(self, dx: Tensor, d: Tensor, times: Times) -> None:
        """Add ``times`` the positions of the output's gradient to the patches of the input's."""
        rows = d.new_zeros(d.shape[0], d.shape[1] * d.shape[3:].numel(), self.weight[1:].numel())
        times(rows, self._by_position(d))
        size = dx.flatten(0, 1).shape
        dx += self.from_patches(rows.reshape(size[0], -1, rows.shape[-1]), size).reshape(dx.shape)

    @staticmethod
    def _by_position(d: Tensor) -> Tensor:
        return d.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        rows = self.patches(x.flatten(0, 1))
        return rows.reshape(x.shape[0], -1, rows.shape[-1])

    def patches(self, x: Tensor) -> Tensor:
        """Return ``(inputs, C, *size)`` as ``(inputs, positions, kernel C)``."""
        padded = self._padded(x.shape, x)
        self._inside(padded).copy_(x.movedim(1, -1))
        first, *strides, channel = padded.stride()
        steps = [s * by for s, by in zip(strides, self.stride, strict=True)]
        taps = [s * by for s, by in zip(strides, self.dilation, strict=True)]
        shape = (x.shape[0], *self.positions(x.shape[2:]), *self.weight[2:], x.shape[1])
        seen = padded.as_strided(shape, (first, *steps, *taps, channel))
        return seen.reshape(x.shape[0], -1, self.weight[1:].numel())

    def from_patches(self, rows: Tensor, size: torch.Size) -> Tensor:
        """Apply the transpose of :meth:`patches`: add every entry to where it was read in ``x`` of this size."""
        padded, positions = self._padded(size, rows), self.positions(size[2:])
        rows = rows.reshape(rows.shape[0], *positions, *self.weight[2:], size[1])
        for tap in product(*map(range, self.weight[2:])):
            along = zip(tap, self.dilation, self.stride, positions, strict=True)
            read = [slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in along]
            seen: tuple[Any, ...] = (..., *tap, slice(None))
            padded[(slice(None), *read)] += rows[seen]
        return self._inside(padded).movedim(-1, 1)

    def positions(self, size: Sequence[int]) -> list[int]:
        """Return the size of the output for that of an input."""
        dims = zip(size, self.padding, self.dilation, self.weight[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in dims]

    def _padded(self, size: torch.Size, like: Tensor) -> Tensor:
        sides = [length + 2 * p for length, p in zip(size[2:], self.padding, strict=True)]
        return like.new_zeros(size[0], *sides, size[1])

    def _inside(self, padded: Tensor) -> Tensor:
        sides = zip(self.padding, padded.shape[1:], strict=False)
        return padded[(slice(None), *[slice(p, length - p) for p, length in sides])]


def side_by_side(x: Tensor) -> Tensor:
    """Return ``(k, inputs, C, ...)`` as ``(inputs, k C, ...)``: the channels of the micro-batches side by side."""
    return x[0] if x.shape[0] == 1 else x.transpose(0, 1).flatten(1, 2)


def apart(y: Tensor, k: int) -> Tensor:
    """Invert :func:`side_by_side`."""
    return y[None] if k == 1 else y.reshape(y.shape[0], k, -1, *y.shape[2:]).transpose(0, 1)


@dataclass(frozen=True)
class Lookup:
    """``y = W[x]``, the product of one-hot rows with ``W``.

    Args:
        height: the rows of ``W``.
        padding: the index of a row that has no gradient.
    """

    height: int
    padding: int | None = None
    turned = True

    def apply(self, x: Tensor, P: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the output for indices ``x``, ``(k, rows)``."""
        return P.gather(1, x[..., None].expand(-1, -1, P.shape[2]))

    def gradients(self, d: Tensor, x: Tensor) -> Tensor:
        """Return the gradients of the tables, ``(k, height, width)``."""
        k = x.shape[0]
        rows = torch.arange(k, device=x.device)[:, None] * self.height + x
        right = self.factors(x, d)[1]
        made: Tensor = torch.ops.aten.embedding_dense_backward(right, rows, k * self.height, -1, False)
        return made.view(k, self.height, -1)

    def factors(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices, for one-hot rows, and the output's gradient, which is 0 at the padding."""
        return x, d if self.padding is None else d * (x != self.padding)[..., None]

    def shape(self, x: Tensor, d: Tensor) -> tuple[int, int, int]:
        """Return the lookups of an example, and height and width of ``W``."""
        return d.shape[1], self.height, d.shape[2]

    def add_output(self, y: Tensor, x: Tensor, times: Times) -> None:
        """Add ``times`` the one-hot rows of ``x`` to the rows of ``y``."""
        times(y, x)


Map = Dense | Conv | Lookup


@dataclass
class Use:
    """One use of a matrix in the first pass.

    Attributes:
        map: the layer.
        x: its input, ``(n, q, ...)``.
        delta: the gradient of its output, ``(n, q, ...)``.
        bias: the index of its bias.
    """

    map: Map
    x: Tensor
    delta: Tensor
    bias: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The rows of an example, and height and width of the matrix."""
        return self.map.shape(self.x, self.delta)

    def to(self, dtype: torch.dtype) -> Use:
        """Return the use in another dtype; indices stay."""
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        return replace(self, x=x, delta=self.delta.to(dtype))

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_i c_i G_i`` over examples."""
        c = c.to(self.delta.dtype).reshape(-1, *[1] * (self.delta.dim() - 1))
        return weight_gradient(self.map, self.delta * c, self.x)


def as_one(t: Tensor) -> Tensor:
    """Return ``(n, q, ...)`` as one micro-batch, ``(1, n q, ...)``."""
    return t.reshape(1, -1, *t.shape[2:])


def weight_gradient(map: Map, d: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the whole batch, ``(height, width)``."""
    return map.gradients(as_one(d), as_one(x))[0]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a_k b_k^T`` for rows of ``(k, rows, width)``, or for one-hot rows of ``(k, rows)``."""
    if a.dim() == b.dim():
        return a @ b.to(a.dtype).mT if a.dim() == 3 else a[:, :, None] == b[:, None, :]
    return a.gather(2, b[:, None].expand(-1, a.shape[1], -1)) if a.dim() == 3 else dot(b, a).mT


def add_product(y: Tensor, c: Tensor, b: Tensor) -> None:
    """Add ``c_k b_k`` to ``y_k`` in place, for rows ``b_k`` as in :func:`dot`."""
    if b.dim() == 3:
        y.baddbmm_(c, b.to(y.dtype))
    else:
        y.scatter_add_(2, b[:, None].expand_as(c), c)
