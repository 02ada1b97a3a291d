"""The gradients of one matrix for every micro-batch: whole, as factors, or by the rows that occur."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.maps import Dense, Lookup, Term, gram
from steppe.factored.microbatches import MicroBatches

CACHE = 1 << 20  # bytes that stay near a processor's core between two uses


class TensorPool:
    """Memory that gradients held in one step leave for those of the next.

    A processor's allocator gives large tensors back to the system, which hands memory out again page by page, zeroed:
    as dear as the products that fill it. Accelerators keep pools of their own.
    """

    def __init__(self) -> None:
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor with arbitrary content."""
        free = self.free.get((torch.Size(shape), dtype)) if device.type == "cpu" else None
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def give(self, t: Tensor) -> None:
        """Take back a tensor that nothing else refers to."""
        if t.device.type == "cpu":
            self.free.setdefault((t.shape, t.dtype), []).append(t)


class Whole:
    """``G_k`` of every part, made from its terms block by block: a block is measured while it is in the cache.

    At its first use, which is once and for all, a block becomes ``W + s_k G_k``, in place where types allow.
    """

    def __init__(self, terms: Sequence[Any], parts: MicroBatches, pool: TensorPool | None = None) -> None:
        self.parts, self.pool = parts, pool or TensorPool()
        self.chunks: list[Tensor] = []  # (parts, height, width)
        self._begun = self._done = False
        squares = []
        for operands in zip(*(parts.zip(*term.operands) for term in terms), strict=True):
            k, (height, width) = len(operands[0][0]), terms[0].size
            dtype = reduce(torch.promote_types, (tensors[-1].dtype for tensors in operands))
            G = self.pool.take((k, height, width), dtype, operands[0][-1].device)
            for a, b in blocks(G):
                for j, (term, tensors) in enumerate(zip(terms, operands, strict=True)):
                    term.write(G[a:b], *(t[a:b] for t in tensors), add=j > 0)
                squares.append(_squares(G[a:b]))
            self.chunks.append(G)
        self._squares = parts.cat(squares)

    def __del__(self) -> None:
        for G in self.chunks:
            self.pool.give(G)

    def squares(self) -> Tensor:
        """Return ``norm(G_k)^2``, shape ``(k,)``, in at least float32."""
        return self._squares

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_k c_k G_k`` over micro-batches of one example each."""
        assert not self._begun
        (G,) = self.chunks
        return (c.to(G.dtype) @ G.flatten(1)).reshape(G.shape[1:])

    def perturbed(self, W: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield ``W + s_k G_k`` in blocks: chunk, parts of the chunk, and weights that last until the next block."""
        if self._begun and not self._done:
            raise RuntimeError("the second pass stopped half way and went on: some weights are perturbed, some are not")
        self._begun = True
        scales = self.parts.split(scale.to(W.dtype)[:, None, None])
        W = W.detach().reshape(self.chunks[0].shape[1:])
        with torch.no_grad():
            for c, (G, s) in enumerate(zip(self.chunks, scales, strict=True)):
                for a, b in blocks(G):
                    g = G[a:b]
                    if G.dtype != W.dtype:
                        g = torch.addcmul(W, g.to(W.dtype), s[a:b])
                    elif not self._done:
                        torch.addcmul(W, g, s[a:b], out=g)
                    yield c, slice(a, b), g.to(dtype)
        self._done = True


def blocks(G: Tensor) -> list[tuple[int, int]]:
    """Return the ranges of micro-batches that fit into the cache together; one range on an accelerator."""
    k, height, width = G.shape
    step = k if G.device.type != "cpu" else max(1, CACHE // (height * width * G.element_size()))
    return [(a, min(a + step, k)) for a in range(0, k, step)]


def _squares(g: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide(g[:0]).dtype)
    return norms.square()


class Rows:
    """``G_k`` of a table that is only looked up: the sums of its rows that occur in part ``k``, and no others.

    As many rows as there are lookups are kept; those of one part and index are added up, the rest stay zero. All sizes
    are known beforehand, so that no device is waited for.
    """

    def __init__(self, terms: Sequence[Lookup], parts: MicroBatches) -> None:
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

    def _keys(self, parts: MicroBatches, index: Tensor) -> Tensor:
        part = parts.spread(torch.arange(parts.k, device=index.device))
        return part.reshape(-1, *[1] * (index.dim() - 1)) * self.height + index

    def squares(self) -> Tensor:
        """Return ``norm(G_k)^2``, shape ``(k,)``, in at least float32."""
        squares = wide(self.sums).square().sum(1)
        return squares.new_zeros(self.parts.k).index_add_(0, self.part, squares)

    def rows(self, index: Tensor) -> Tensor:
        """Return ``G_k[index]`` for indices of ``(n, q)``: ``(n, q, columns)``."""
        keys = self._keys(self.parts, index)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where((self.keys[place] == keys)[..., None], self.sums[place], 0)

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_k c_k G_k``."""
        rows = self.sums * c.to(self.sums.dtype)[self.part][:, None]
        return rows.new_zeros(self.height, rows.shape[1]).index_add_(0, self.keys % self.height, rows)


@dataclass
class Factors:
    """Every micro-batch's gradient of one matrix as factors: a sum of terms, one a use of the parameter."""

    terms: Sequence[Term]
    parts: MicroBatches

    @property
    def bias(self) -> int | None:
        """The index of the bias whose gradient is a further column."""
        return next((term.bias for term in self.terms if isinstance(term, Dense)), None)

    def rows(self, index: Tensor) -> Tensor:
        """Return ``G_k[index]`` for indices of ``(n, q)``: ``(n, q, columns)``."""
        with uncast(index):
            made = [term.rows(index, self.parts) for term in self.terms]
        return self.parts.join([sum(chunk[1:], chunk[0]) for chunk in zip(*made, strict=True)], index.shape[1])

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_k c_k G_k`` over micro-batches of one example each."""
        made = [term.weighted(c) for term in self.terms]
        return sum(made[1:], made[0])

    def weighted_bias(self, c: Tensor) -> Tensor:
        """Return the same sum for the bias."""
        (term,) = self.terms
        assert isinstance(term, Dense)
        return c.to(term.left.dtype) @ term.left.sum(1)


Gradient = Factors | Whole | Rows


def squared_norms(gradients: Iterable[Gradient], small: Iterable[Tensor]) -> Tensor:
    """Return ``norm(G_k)^2`` over all of these parameters together, shape ``(k,)``, in at least float32."""
    gradients, small = list(gradients), list(small)
    factored = [g for g in gradients if isinstance(g, Factors)]
    found = [g.squares() for g in gradients if not isinstance(g, Factors)]
    if small:
        found.append(wide(torch.cat([t.flatten(1) for t in small], 1)).square().sum(1))
    if factored:
        found.append(_squares_of_factors(factored))
    return sum(found[1:], found[0])


def _squares_of_factors(gradients: Sequence[Factors]) -> Tensor:
    square, size = _grams(gradients)
    noise = size * (1e-3 if square.dtype == torch.float32 else 1e-9)
    if square.device.type != "cpu":
        return torch.maximum(square, noise * 1e-3)  # a wait for the device would be dearer than a short step
    if bool((square < noise).any()):  # examples cancel: what is left drowns in rounding
        square, _ = _grams([replace(g, terms=[term.to(torch.float64) for term in g.terms]) for g in gradients])
    return square.to(size.dtype)


def _grams(gradients: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """Return ``sum <G_k, G_k>``, shape ``(k,)``, and the sum of the absolute values of its terms."""
    parts: MicroBatches | None = None
    total: dict[Any, Tensor] = {}  # products of equal shape are added before they are summed
    for gradient in gradients:
        parts = gradient.parts
        for i, a in enumerate(gradient.terms):
            for b in gradient.terms[: i + 1]:
                for chunk, (left, right) in enumerate(gram(a, b, parts)):
                    key = (chunk, left.shape)
                    total[key] = _add_product(total.get(key), wide(left), wide(right), 1 if a is b else 2)
    assert parts is not None
    by_chunk = [[p for (chunk, _), p in total.items() if chunk == i] for i in range(len(parts.spans))]
    squares = [sum(p.sum((1, 2)) for p in products) for products in by_chunk]
    sizes = [sum(torch.linalg.vector_norm(p, 1, (1, 2)) for p in products) for products in by_chunk]
    return parts.cat(squares), parts.cat(sizes)  # type: ignore[arg-type]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, times: int) -> Tensor:
    if total is None:
        return left * right if times == 1 else left * right * times
    return total.addcmul_(left, right, value=times)


@dataclass(frozen=True)
class Product:
    """``x_k -> s_k x_k G_k^T`` with ``G_k`` as factors; ``turned`` where ``G_k`` is a gradient of ``W^T``."""

    gradient: Factors
    scale: Tensor
    turned: bool = False

    def add(self, y: Tensor, x: Tensor, back: bool = False) -> None:
        """Add in place ``y_k += s_k x_k G_k^T``, or with ``back`` ``s_k x_k G_k``; all are ``(n, q, ...)``."""
        assert y.is_contiguous()  # else its parts would be copies
        low = x.dtype == torch.float16  # whose sums end at 65504
        to, x = (torch.zeros_like(y, dtype=torch.float32), x.float()) if low else (y, x)
        with uncast(x) if low else nullcontext():
            for term in self.gradient.terms:
                add = term.add_times if self.turned == back else term.add_transposed_times
                add(to, x, self.scale, self.gradient.parts)
        if low:
            y.add_(to)


def uncast(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their operands, also under autocast."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
