"""Layers as bilinear maps ``y = B(x, W)``: a matrix product, a convolution, a lookup.

A map is applied, and its gradients are taken, with the weights ``P_k`` of each micro-batch, ``(k, height, width)``. One
``W`` for the whole batch is the case of one micro-batch. The gradient of ``W`` for micro-batch ``k`` is a product
``G_k = left_k^T right_k`` over the rows of its examples, and ``factors`` returns both sides. For ``y = x W^T``,
``left`` is the gradient of the output, and ``right`` is the input. A map that is ``turned`` has ``y = x W``, and the
sides exchanged. An integer tensor of indices stands for one-hot rows.

Tensors by example are ``(n, q, ...)``, those by micro-batch ``(k, rows, ...)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steppe.factored.microbatches import MicroBatches
from steppe.factored.patches import ConvSpec, from_patches, patches

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

    def write(self, G: Tensor, d: Tensor, x: Tensor, add: bool = False) -> None:
        """Write the gradients of the weights to ``G``, or add them."""
        left, right = self.factors(x, d)
        if G.dtype == left.dtype:
            torch.baddbmm(G, left.mT, right, beta=int(add), out=G)
        else:  # under autocast, beside a lookup
            G.add_(left.mT @ right) if add else G.copy_(left.mT @ right)

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
    """``y = conv(x, W) + b`` in one, two or three dimensions; micro-batches are groups of one convolution."""

    spec: ConvSpec
    turned = False

    def apply(self, x: Tensor, P: Tensor, b: Tensor | None = None) -> Tensor:
        """Return the output for ``x``, ``(k, inputs, C, ...)``, with ``b`` of ``(k, height)``."""
        made = []
        for at in self.blocks(x):
            weights, bias = P[at].reshape(-1, *self.spec.shape[1:]), None if b is None else b[at].flatten()
            made.append(apart(self.spec.forward(side_by_side(x[at]), weights, len(P[at]), bias), len(P[at])))
        return MicroBatches.cat(made)

    def input_gradient(self, d: Tensor, x: Tensor, P: Tensor) -> Tensor:
        """Return the gradient of the input."""
        made = []
        for at in self.blocks(x):
            weights, k = P[at].reshape(-1, *self.spec.shape[1:]), len(P[at])
            like = x.new_empty(x.shape[1], k * x.shape[2], *x.shape[3:])  # for its shape alone
            made.append(apart(self.spec.backward(side_by_side(d[at]), like, weights, [True, False], k)[0], k))
        return MicroBatches.cat(made)

    def write(self, G: Tensor, d: Tensor, x: Tensor, add: bool = False) -> None:
        """Write the gradients of the weights to ``G``, or add them."""
        for at in self.blocks(x):
            made = self.spec.weight_gradient(side_by_side(d[at]), side_by_side(x[at]), len(x[at])).reshape(G[at].shape)
            G[at].add_(made) if add else G[at].copy_(made)

    def blocks(self, x: Tensor) -> list[slice]:
        """Return the micro-batches that share a call, as a group each: all on an accelerator.

        On a CPU, one from 8 inputs on, because groups copy their inputs: that saves 8 % of a step on a small CNN at
        ``m = 8``. Else as many as have a megabyte of weights, which saves 9 % there at ``m = 1``.
        """
        k, step = len(x), len(x)
        if x.device.type == "cpu":
            step = 1 if x.shape[1] >= 8 else max(1, (1 << 20) // (self.spec.shape.numel() * x.element_size()))
        return [slice(i, i + step) for i in range(0, k, step)]

    def factors(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output's gradient by position, and the patch of the input (channels last) at each position."""
        return self._positions(d), self._patches(x)

    def shape(self, x: Tensor, d: Tensor) -> tuple[int, int, int]:
        """Return the positions of an example, and height and width of ``W``."""
        return d[0, :, 0].numel(), self.spec.shape[0], self.spec.shape[1:].numel()

    def add_output(self, y: Tensor, x: Tensor, times: Times) -> None:
        """Add ``times`` the patches of ``x`` to the positions of ``y``."""
        rows = y.new_zeros(len(y), y[0, :, 0].numel(), y.shape[2])
        times(rows, self._patches(x))
        y += rows.reshape(*y.shape[:2], -1, y.shape[2]).mT.reshape(y.shape)

    def add_input_gradient(self, dx: Tensor, d: Tensor, times: Times) -> None:
        """Add ``times`` the positions of the output's gradient to the patches of the input's."""
        rows = d.new_zeros(len(d), d[0, :, 0].numel(), self.spec.shape[1:].numel())
        times(rows, self._positions(d))
        size = dx.flatten(0, 1).shape
        dx += from_patches(rows.reshape(size[0], -1, rows.shape[-1]), size, self.spec).reshape(dx.shape)

    @staticmethod
    def _positions(d: Tensor) -> Tensor:
        return d.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        rows = patches(x.flatten(0, 1), self.spec)
        return rows.reshape(len(x), -1, rows.shape[-1])


def side_by_side(x: Tensor) -> Tensor:
    """Return ``(k, inputs, C, ...)`` as ``(inputs, k C, ...)``: the channels of the micro-batches side by side."""
    return x[0] if len(x) == 1 else x.transpose(0, 1).flatten(1, 2)


def apart(y: Tensor, k: int) -> Tensor:
    """Invert :func:`side_by_side`."""
    made: Tensor = y[None] if k == 1 else y.unflatten(1, (k, -1)).transpose(0, 1)
    return made


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

    def write(self, G: Tensor, d: Tensor, x: Tensor, add: bool = False) -> None:
        """Write the gradients of the tables to ``G``, or add them."""
        rows = torch.arange(len(x), device=x.device)[:, None] * self.height + x
        made = torch.ops.aten.embedding_dense_backward(self.factors(x, d)[1], rows, len(x) * self.height, -1, False)
        G.add_(made.view_as(G)) if add else G.copy_(made.view_as(G))

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
    _, height, width = map.shape(x, d)
    G = d.new_empty(1, height, width)
    map.write(G, as_one(d), as_one(x))
    return G[0]


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
