"""Gradients of one matrix, held whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.parts import Parts

CACHE = 1 << 20  # bytes that stay near a processor's core between two uses


class Pool:
    """Memory that gradients held in one step leave for those of the next.

    A processor's allocator gives large tensors back to the system, which hands memory out again page by page, zeroed:
    as dear as the products that fill it. Accelerators keep pools of their own.
    """

    def __init__(self) -> None:
        self.free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor with any content."""
        free = self.free.get((torch.Size(shape), dtype)) if device.type == "cpu" else None
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def give(self, t: Tensor) -> None:
        """A tensor that nobody else holds."""
        if t.device.type == "cpu":
            self.free.setdefault((t.shape, t.dtype), []).append(t)


class Held:
    """``G_k`` of every part, made from its terms block by block: a block is measured while it is in the cache.

    At its first use, which is once and for all, a block becomes ``W + s_k G_k``, in place where types allow.
    """

    def __init__(self, terms: Sequence[Any], parts: Parts, pool: Pool | None = None) -> None:
        self.parts, self.pool = parts, pool or Pool()
        self.chunks: list[Tensor] = []  # (parts, height, width)
        self._begun = self._done = False
        squares = []
        for operands in zip(*(parts.beside(*term.operands) for term in terms), strict=True):
            k, (height, width) = len(operands[0][0]), terms[0].size
            dtype = reduce(torch.promote_types, (tensors[-1].dtype for tensors in operands))
            G = self.pool.take((k, height, width), dtype, operands[0][-1].device)
            for a, b in blocks(G):
                for j, (term, tensors) in enumerate(zip(terms, operands, strict=True)):
                    term.write(G[a:b], *(t[a:b] for t in tensors), add=j > 0)
                squares.append(_squares(G[a:b]))
            self.chunks.append(G)
        self._squares = parts.together(squares)

    def __del__(self) -> None:
        for G in self.chunks:
            self.pool.give(G)

    def squares(self) -> Tensor:
        """``norm(G_k)^2``, shape ``(k,)``, in at least float32."""
        return self._squares

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_k c_k G_k`` over parts of one example each."""
        assert not self._begun
        (G,) = self.chunks
        return (c.to(G.dtype) @ G.flatten(1)).reshape(G.shape[1:])

    def perturbed(self, W: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
        """``W + s_k G_k`` in blocks: chunk, parts of the chunk and weights, which last until the next block."""
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
    """Parts that fit into the cache together, first and last + 1; all of them on an accelerator."""
    k, height, width = G.shape
    step = k if G.device.type != "cpu" else max(1, CACHE // (height * width * G.element_size()))
    return [(a, min(a + step, k)) for a in range(0, k, step)]


def _squares(g: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide(g[:0]).dtype)
    return norms.square()
