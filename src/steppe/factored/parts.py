"""Which rows of a tensor belong to which example, and which examples to which micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Row ``r`` belongs to example ``(r // inner) % n``: tokens of an example may be neighbours or far apart."""

    n: int
    inner: int

    def by_example(self, t: Tensor) -> Tensor:
        """``(rows, ...)`` as ``(n, rows / n, ...)``; a view where an example's rows are neighbours."""
        rest = t.shape[1:]
        if len(t) == self.n * self.inner:
            return t.reshape(self.n, self.inner, *rest)
        return t.reshape(-1, self.n, self.inner, *rest).transpose(0, 1).reshape(self.n, -1, *rest)

    def by_row(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`by_example`."""
        if t.shape[1] == self.inner:
            return t.flatten(0, 1)
        rest = t.shape[2:]
        return t.reshape(self.n, -1, self.inner, *rest).transpose(0, 1).reshape(-1, *rest)

    def example_of_row(self, rows: int, device: torch.device) -> Tensor:
        """The example of every row, shape ``(rows,)``."""
        return torch.arange(rows, device=device) // self.inner % self.n


def layouts(n: int, leading: Sequence[int]) -> list[Layout]:
    """The ways in which ``n`` examples may lie in leading dimensions: along one, or folded into one with others."""
    inners = []
    for j, size in enumerate(leading):
        if size % n == 0:
            after = prod(leading[j + 1 :])
            inners += [size // n * after, after]
    return [Layout(n, inner) for inner in dict.fromkeys(inners)]


@dataclass(frozen=True)
class Parts:
    """``n`` examples in micro-batches of ``m`` in order; the last has what remains.

    Tensors by example are handled in one or two chunks of equal parts: the full micro-batches, and the rest.
    """

    n: int
    m: int

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """First example, last example + 1 and size of the parts, of each chunk."""
        m = min(self.m, self.n)
        whole = self.n // m * m
        return [(0, whole, m)] + ([(whole, self.n, self.n - whole)] if whole < self.n else [])

    @property
    def k(self) -> int:
        """How many parts."""
        return -(-self.n // self.m)

    def sizes(self, like: Tensor) -> Tensor:
        """Examples of each part, shape ``(k,)``."""
        sizes = like.new_full((self.k,), self.spans[0][2])  # made where it is: a copy would wait for the device
        sizes[-1:].fill_(self.spans[-1][2])
        return sizes

    def chunks(self, t: Tensor) -> list[Tensor]:
        """``(n, q, ...)`` as a list of ``(parts, m q, ...)``; views where ``t`` is contiguous."""
        q, *rest = t.shape[1:]
        if len(self.spans) == 1:
            return [t.reshape(self.k, self.spans[0][2] * q, *rest)]
        return [t[a:b].reshape((b - a) // m, m * q, *rest) for a, b, m in self.spans]

    def beside(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Chunks of several tensors: ``(n, q, ...)`` by :meth:`chunks`, ``(k,)`` by :meth:`split`."""
        chunked = [self.split(t) if t.dim() == 1 else self.chunks(t) for t in tensors]
        return list(zip(*chunked, strict=True))

    def join(self, chunks: Sequence[Tensor], q: int) -> Tensor:
        """The inverse of :meth:`chunks`."""
        return self.together([c.reshape(-1, q, *c.shape[2:]) for c in chunks])

    def split(self, t: Tensor) -> list[Tensor]:
        """``(k, ...)`` by chunk."""
        return [t] if len(self.spans) == 1 else list(t.split([(b - a) // m for a, b, m in self.spans]))

    def sums(self, t: Tensor) -> Tensor:
        """``(n, ...)`` summed over each part: ``(k, ...)``."""
        return self.together([t[a:b].reshape((b - a) // m, m, *t.shape[1:]).sum(1) for a, b, m in self.spans])

    def spread(self, t: Tensor) -> Tensor:
        """``(k, ...)`` repeated for each example of a part: ``(n, ...)``."""
        repeated = [
            c[:, None].expand(-1, m, *c.shape[1:]).flatten(0, 1)
            for c, (_, _, m) in zip(self.split(t), self.spans, strict=True)
        ]
        return self.together(repeated)

    @staticmethod
    def together(chunks: Sequence[Tensor]) -> Tensor:
        """Chunks below each other."""
        return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))
