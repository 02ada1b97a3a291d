"""Gradients of tables whose rows are looked up by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.parts import Parts


@dataclass(frozen=True)
class Lookup:
    """``G_k[index_r] += right_r``; ``index``: ``(n, q)``, ``right``: ``(n, q, columns)``, ``height`` rows."""

    index: Tensor
    right: Tensor
    height: int

    def to(self, dtype: torch.dtype) -> Lookup:
        """In another type."""
        return Lookup(self.index, self.right.to(dtype), self.height)

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_i c_i G_i`` over examples."""
        rows = (self.right * c.to(self.right.dtype)[:, None, None]).flatten(0, 1)
        return rows.new_zeros(self.height, rows.shape[1]).index_add_(0, self.index.flatten(), rows)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.height, self.right.shape[-1]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What :meth:`write` wants of the parts."""
        return self.index, self.right

    @staticmethod
    def write(G: Tensor, index: Tensor, right: Tensor, add: bool) -> None:
        """``G_k`` of some parts, or add them to what is there."""
        (G if add else G.zero_()).scatter_add_(1, index[..., None].expand_as(right), right.to(G.dtype))

    def add_times(self, y: Tensor, x: Tensor, s: Tensor, parts: Parts) -> None:
        """``y_k += s_k x_k G_k^T`` in place."""
        for y_k, x_k, s_k, index, right in parts.beside(y, x, s, self.index, self.right):
            products = times(x_k @ right.to(x.dtype).mT, s_k)
            y_k.scatter_add_(2, index[:, None].expand_as(products), products)

    def add_transposed_times(self, y: Tensor, x: Tensor, s: Tensor, parts: Parts) -> None:
        """``y_k += s_k x_k G_k`` in place."""
        for y_k, x_k, s_k, index, right in parts.beside(y, x, s, self.index, self.right):
            y_k.baddbmm_(times(columns(x_k, index), s_k), right.to(y.dtype))

    def rows(self, index: Tensor, parts: Parts) -> list[Tensor]:
        """``G_k[index]`` by chunk, for indices of ``(n, q)``."""
        mine = parts.beside(index, self.index, self.right)
        return [(i[:, :, None] == j[:, None, :]).to(right.dtype) @ right for i, j, right in mine]


class Coalesced:
    """``G_k`` of a table that is only looked up: the sums of its rows that occur in part ``k``, and no others.

    As many rows as there are lookups are kept; those of one part and index are added up, the rest stay zero. All sizes
    are known beforehand, so that no device is waited for.
    """

    def __init__(self, terms: Sequence[Lookup], parts: Parts) -> None:
        self.parts, self.height = parts, terms[0].height
        right = torch.cat([t.right.flatten(0, 1) for t in terms])
        keys, order = torch.cat([self._keys(parts, t.index).flatten() for t in terms]).sort()
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        place = first.cumsum(0) - 1
        beyond = parts.n * self.height
        self.keys = torch.full_like(keys, beyond).scatter_(0, place, keys)  # ascending, each once; then `beyond`
        self.sums = torch.zeros_like(right).index_add_(0, place, right[order])
        self.part = (self.keys // self.height).clamp_max(parts.k - 1)

    def _keys(self, parts: Parts, index: Tensor) -> Tensor:
        part = parts.spread(torch.arange(parts.k, device=index.device))
        return part.reshape(-1, *[1] * (index.dim() - 1)) * self.height + index

    def squares(self) -> Tensor:
        """``norm(G_k)^2``, shape ``(k,)``, in at least float32."""
        squares = wide(self.sums).square().sum(1)
        return squares.new_zeros(self.parts.k).index_add_(0, self.part, squares)

    def rows(self, index: Tensor) -> Tensor:
        """``G_k[index]`` for indices of ``(n, q)``: ``(n, q, columns)``."""
        keys = self._keys(self.parts, index)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where((self.keys[place] == keys)[..., None], self.sums[place], 0)

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_k c_k G_k``."""
        rows = self.sums * c.to(self.sums.dtype)[self.part][:, None]
        return rows.new_zeros(self.height, rows.shape[1]).index_add_(0, self.keys % self.height, rows)


def columns(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]`` for every part: ``(parts, rows of x, rows)``."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


def times(products: Tensor, s: Tensor) -> Tensor:
    """``s_k products_k``, in place where types allow; rounded once."""
    s = s[:, None, None]
    return products.mul_(s) if products.dtype == s.dtype else (products * s).to(products.dtype)
