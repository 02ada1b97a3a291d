"""What one use of a matrix contributes to its micro-batch gradients: dense rows, a convolution, looked-up rows.

The gradient of a matrix of shape ``(height, width)`` for micro-batch ``k`` is ``G_k = sum_r left_r right_r^T`` over the
rows ``r`` of its examples. For ``y = W a``, ``left`` is the gradient of the output and ``right`` the input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steppe.factored.microbatches import MicroBatches
from steppe.factored.patches import ConvSpec, patches


@dataclass(frozen=True)
class Dense:
    """``left``: ``(n, q, rows)``, ``right``: ``(n, q, columns)``.

    With ``bias``, the index of a parameter, ``right`` has one more column, of ones: its gradient rides along. With
    ``source``, of which these are the patches, that makes the weighted sum.
    """

    left: Tensor
    right: Tensor
    bias: int | None = None
    source: Any = None  # a convolution's term

    def to(self, dtype: torch.dtype) -> Dense:
        """Return the term in another dtype."""
        source = self.source and self.source.to(dtype)
        return replace(self, left=self.left.to(dtype), right=self.right.to(dtype), source=source)

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_i c_i G_i`` over examples."""
        if self.source is not None:
            return self.source.weighted(c)  # type: ignore[no-any-return]
        left = self.left * c.to(self.left.dtype)[:, None, None]
        return left.flatten(0, 1).mT @ self.right.flatten(0, 1)

    def shape(self, parts: MicroBatches) -> tuple[int, int, int]:
        """Return the rows of a micro-batch, and height and width of ``G_k``."""
        return min(parts.m, parts.n) * self.left.shape[1], *self.size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The arguments of :meth:`write`, by example."""
        return self.left, self.right

    @staticmethod
    def write(G: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        """Write ``G_k`` of some micro-batches, or add it to the content."""
        if G.dtype == left.dtype:
            torch.baddbmm(G, left.mT, right, beta=int(add), out=G)
        else:  # under autocast, beside a lookup
            G.add_(left.mT @ right) if add else G.copy_(left.mT @ right)

    def add_times(self, y: Tensor, x: Tensor, s: Tensor, parts: MicroBatches) -> None:
        """Add in place ``y_k += s_k (x_k, 1) G_k^T`` in place, the 1 where a bias rides along."""
        for y_k, x_k, s_k, left, right in parts.zip(y, x, s, self.left, self.right):
            y_k.baddbmm_(times(self._plus_ones(x_k @ right.to(x.dtype).mT), s_k), left.to(y.dtype))

    def add_transposed_times(self, y: Tensor, x: Tensor, s: Tensor, parts: MicroBatches) -> None:
        """Add in place ``y_k += s_k x_k G_k`` in place."""
        for y_k, x_k, s_k, left, right in parts.zip(y, x, s, self.left, self.right):
            y_k.baddbmm_(times(x_k @ left.to(x.dtype).mT, s_k), right.to(y.dtype))

    def rows(self, index: Tensor, parts: MicroBatches) -> list[Tensor]:
        """``G_k[index]`` by chunk, for indices of ``(n, q)``."""
        return [columns(left, i).mT @ right for i, left, right in parts.zip(index, self.left, self.right)]

    def _plus_ones(self, products: Tensor) -> Tensor:
        return products if self.bias is None else products.add_(1)


@dataclass(frozen=True)
class Lookup:
    """``G_k[index_r] += right_r``; ``index``: ``(n, q)``, ``right``: ``(n, q, columns)``, ``height`` rows."""

    index: Tensor
    right: Tensor
    height: int

    def to(self, dtype: torch.dtype) -> Lookup:
        """Return the term in another dtype."""
        return Lookup(self.index, self.right.to(dtype), self.height)

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_i c_i G_i`` over examples."""
        rows = (self.right * c.to(self.right.dtype)[:, None, None]).flatten(0, 1)
        return rows.new_zeros(self.height, rows.shape[1]).index_add_(0, self.index.flatten(), rows)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.height, self.right.shape[-1]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The arguments of :meth:`write`, by example."""
        return self.index, self.right

    @staticmethod
    def write(G: Tensor, index: Tensor, right: Tensor, add: bool) -> None:
        """Write ``G_k`` of some micro-batches, or add it to the content."""
        (G if add else G.zero_()).scatter_add_(1, index[..., None].expand_as(right), right.to(G.dtype))

    def add_times(self, y: Tensor, x: Tensor, s: Tensor, parts: MicroBatches) -> None:
        """Add in place ``y_k += s_k x_k G_k^T`` in place."""
        for y_k, x_k, s_k, index, right in parts.zip(y, x, s, self.index, self.right):
            products = times(x_k @ right.to(x.dtype).mT, s_k)
            y_k.scatter_add_(2, index[:, None].expand_as(products), products)

    def add_transposed_times(self, y: Tensor, x: Tensor, s: Tensor, parts: MicroBatches) -> None:
        """Add in place ``y_k += s_k x_k G_k`` in place."""
        for y_k, x_k, s_k, index, right in parts.zip(y, x, s, self.index, self.right):
            y_k.baddbmm_(times(columns(x_k, index), s_k), right.to(y.dtype))

    def rows(self, index: Tensor, parts: MicroBatches) -> list[Tensor]:
        """``G_k[index]`` by chunk, for indices of ``(n, q)``."""
        mine = parts.zip(index, self.index, self.right)
        return [(i[:, :, None] == j[:, None, :]).to(right.dtype) @ right for i, j, right in mine]


LOOP = 8  # inputs in a part from which on a CPU one convolution a part is faster than a group a part, which copies


def one_by_one(x: Tensor) -> bool:
    """Return whether to call one convolution for each of ``(k, m, C, ...)``; accelerators prefer one call."""
    return x.device.type == "cpu" and x.shape[1] >= LOOP


def side_by_side(x: Tensor) -> Tensor:
    """Return ``(k, m, C, ...)`` as ``(m, k C, ...)``: the parts' channels beside each other."""
    return x.transpose(0, 1).flatten(1, 2)


def below(y: Tensor, k: int) -> Tensor:
    """Invert :func:`side_by_side`: ``(k m, C, ...)``."""
    return y.reshape(len(y), k, -1, *y.shape[2:]).transpose(0, 1).reshape(len(y) * k, -1, *y.shape[2:])


@dataclass(frozen=True)
class Convolved:
    """A convolution's term: ``x`` ``(n, q, C, ...)`` and ``left`` ``(n, q, C_out, ...)``, ``q`` inputs an example."""

    x: Tensor
    left: Tensor
    spec: ConvSpec

    def to(self, dtype: torch.dtype) -> Convolved:
        """Return the term in another dtype."""
        return Convolved(self.x.to(dtype), self.left.to(dtype), self.spec)

    def shape(self, parts: MicroBatches) -> tuple[int, int, int]:
        """Return the rows of a micro-batch, and height and width of ``G_k``."""
        return min(parts.m, parts.n) * self.left[0, :, 0].numel(), *self.size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.spec.shape[0], self.spec.shape[1:].numel()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """The arguments of :meth:`write`, by example."""
        return self.left, self.x

    def write(self, G: Tensor, left: Tensor, x: Tensor, add: bool) -> None:
        """Write ``G_k`` of some micro-batches, or add it to the content."""
        if one_by_one(x):
            made = [self.spec.weight_gradient(d, a).reshape(G[0].shape) for d, a in zip(left, x, strict=True)]
        else:
            whole = self.spec.weight_gradient(side_by_side(left), side_by_side(x), len(x))
            G, made = G[None], [whole.reshape(G.shape)]
        for to, g in zip(G, made, strict=True):
            to.add_(g) if add else to.copy_(g)

    def dense(self) -> Dense:
        """Return the same term as a product of patches."""
        left = self.left.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)
        right = patches(self.x.flatten(0, 1), self.spec)
        return Dense(left, right.reshape(len(self.x), -1, right.shape[-1]), source=self)

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_i c_i G_i`` over examples, by one convolution: of the weight's shape."""
        delta = self.left * c.to(self.left.dtype).reshape(-1, *[1] * (self.left.dim() - 1))
        return self.spec.weight_gradient(delta.flatten(0, 1), self.x.flatten(0, 1))


Term = Dense | Lookup


def gram(a: Term, b: Term, parts: MicroBatches) -> list[tuple[Tensor, Tensor]]:
    """Return products of rows by chunk: ``<G_k of a, G_k of b>`` is the sum of left times right."""
    right = [x @ y.mT for x, y in parts.zip(a.right, b.right)]
    if isinstance(a, Dense) and a.bias is not None:
        right = [r.add_(1) for r in right]
    return list(zip(_left_products(a, b, parts), right, strict=True))


def _left_products(a: Term, b: Term, parts: MicroBatches) -> list[Tensor]:
    match a, b:
        case Dense(), Dense():
            return [x @ y.mT for x, y in parts.zip(a.left, b.left)]
        case Dense(), Lookup():
            return [columns(x, j) for x, j in parts.zip(a.left, b.index)]
        case Lookup(), Dense():
            return [p.mT for p in _left_products(b, a, parts)]
        case Lookup(), Lookup():
            return [(i[:, :, None] == j[:, None, :]).to(a.right.dtype) for i, j in parts.zip(a.index, b.index)]
    raise TypeError((a, b))


def columns(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[..., index]`` for every part: ``(parts, rows of x, rows)``."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def times(products: Tensor, s: Tensor) -> Tensor:
    """Return ``s_k products_k``, in place where the dtypes allow, rounded once."""
    s = s[:, None, None]
    return products.mul_(s) if products.dtype == s.dtype else (products * s).to(products.dtype)
