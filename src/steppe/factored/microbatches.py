"""Which rows of a tensor belong to which example, and which examples to which micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Assigns row ``r`` to example ``(r // inner) % n``: the rows of an example may be neighbours or far apart."""

    n: int
    inner: int

    def by_example(self, t: Tensor) -> Tensor:
        """Return ``(rows, ...)`` as ``(n, rows / n, ...)``; a view where an example's rows are neighbours."""
        rest = t.shape[1:]
        if t.shape[0] == self.n * self.inner:
            return t.reshape(self.n, self.inner, *rest)
        return t.reshape(-1, self.n, self.inner, *rest).transpose(0, 1).reshape(self.n, -1, *rest)

    def by_row(self, t: Tensor) -> Tensor:
        """Invert :meth:`by_example`."""
        if t.shape[1] == self.inner:
            return t.flatten(0, 1)
        rest = t.shape[2:]
        return t.reshape(self.n, -1, self.inner, *rest).transpose(0, 1).reshape(-1, *rest)

    def example_of_row(self, rows: int, device: torch.device) -> Tensor:
        """Return the example of every row, shape ``(rows,)``."""
        return torch.arange(rows, device=device) // self.inner % self.n


@dataclass(frozen=True)
class Place:
    """Where examples lie in the leading dimensions of a tensor, whatever their sizes.

    Attributes:
        dimension: the dimension along which they lie.
        folded: whether it may hold several rows of an example: ``""`` for one, ``"outer"`` where those are neighbours,
            ``"inner"`` where they are ``n`` apart.
    """

    dimension: int
    folded: str = ""

    def layout(self, n: int, leading: Sequence[int]) -> Layout | None:
        """Return the layout of ``n`` examples; ``None`` where they cannot lie here."""
        size, after = leading[self.dimension], prod(leading[self.dimension + 1 :])
        if size % n or (not self.folded and size != n):
            return None
        return Layout(n, (size // n if self.folded == "outer" else 1) * after)


def merged(a: Place | None, b: Place | None) -> Place | None:
    """Return the place that fits wherever one of both does: one row may be one of several; ``None`` without one."""
    if a is None or b is None or a.dimension != b.dimension or (a.folded and b.folded and a != b):
        return None
    return a if a.folded else b


def places(n: int, leading: Sequence[int]) -> dict[Layout, Place]:
    """Return where ``n`` examples may lie, by layout: along one dimension, or folded into one with others."""
    found: dict[Layout, Place] = {}
    for j, size in enumerate(leading):
        for place in [Place(j)] if size == n else [Place(j, "outer"), Place(j, "inner")]:
            layout = place.layout(n, leading)
            if layout is not None:
                found.setdefault(layout, place)
                if n == 1:  # all are alike
                    return found
    return found


@dataclass(frozen=True)
class MicroBatches:
    """``n`` examples in micro-batches of ``m``, in order; the last one has the remainder.

    Tensors by example are processed in chunks of equal micro-batches: the full ones, and the last.

    Attributes:
        n: the number of examples.
        m: the size of a micro-batch.
        block: how many micro-batches a chunk has at most; ``None`` for any number.
    """

    n: int
    m: int
    block: int | None = None

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """For each chunk: its first example, its last example + 1, the size of its micro-batches."""
        m = min(self.m, self.n)
        whole = self.n // m * m
        step = whole if self.block is None else m * self.block
        full = [(a, min(a + step, whole), m) for a in range(0, whole, step)]
        return full + ([(whole, self.n, self.n - whole)] if whole < self.n else [])

    @cached_property
    def starts(self) -> list[int]:
        """The first example of each micro-batch."""
        return list(range(0, self.n, self.m))

    @cached_property
    def k(self) -> int:
        """The number of micro-batches."""
        return -(-self.n // self.m)

    def in_blocks(self, block: int | None) -> "MicroBatches":
        """Return the same in chunks of at most so many micro-batches."""
        return self if block is None or block >= self.k else _in_blocks(self.n, self.m, block)

    def sizes(self, like: Tensor) -> Tensor:
        """Return the number of examples in each micro-batch, shape ``(k,)``."""
        sizes = like.new_full((self.k,), self.spans[0][2])  # made on the device: a copy would wait for it
        sizes[-1:].fill_(self.spans[-1][2])
        return sizes

    def chunks(self, t: Tensor) -> list[Tensor]:
        """Return ``(n, q, ...)`` as a list of ``(parts, m q, ...)``; views where ``t`` is contiguous."""
        q, *rest = t.shape[1:]
        if len(self.spans) == 1:
            return [t.reshape(self.k, self.n // self.k * q, *rest)]
        return [t[a:b].reshape((b - a) // m, m * q, *rest) for a, b, m in self.spans]

    def zip(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Return the chunks of several tensors together: ``(n, q, ...)`` and ``(k,)`` alike."""
        chunked = [self.split(t) if t.dim() == 1 else self.chunks(t) for t in tensors]
        return list(zip(*chunked, strict=True))

    def join(self, chunks: Sequence[Tensor], q: int) -> Tensor:
        """Invert :meth:`chunks`."""
        rest = chunks[0].shape[2:]
        if len(chunks) == 1:
            return chunks[0].reshape(-1, q, *rest)
        joined = chunks[0].new_empty(self.n, q, *rest)
        for part, chunk in zip(self.chunks(joined), chunks, strict=True):
            part.copy_(chunk)
        return joined

    def split(self, t: Tensor) -> list[Tensor]:
        """Return ``(k, ...)`` as a list of chunks."""
        return [t] if len(self.spans) == 1 else list(t.split([(b - a) // m for a, b, m in self.spans]))

    def sums(self, t: Tensor) -> Tensor:
        """Return ``(n, ...)`` summed over each micro-batch: ``(k, ...)``."""
        return self.cat([t[a:b].reshape((b - a) // m, m, *t.shape[1:]).sum(1) for a, b, m in self.spans])

    def spread(self, t: Tensor) -> Tensor:
        """Return ``(k, ...)`` repeated for each example of a micro-batch: ``(n, ...)``."""
        repeated = [
            c[:, None].expand(-1, m, *c.shape[1:]).flatten(0, 1)
            for c, (_, _, m) in zip(self.split(t), self.spans, strict=True)
        ]
        return self.cat(repeated)

    @staticmethod
    def cat(chunks: Sequence[Tensor]) -> Tensor:
        """Concatenate chunks along the first dimension; one chunk is not copied."""
        return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))


@lru_cache
def _in_blocks(n: int, m: int, block: int) -> MicroBatches:
    return MicroBatches(n, m, block)
