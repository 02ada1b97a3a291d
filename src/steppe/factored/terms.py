"""A micro-batch's gradient of one matrix, held as factors.

The gradient of a matrix of shape ``(rows, columns)`` for micro-batch ``k`` is ``G_k = sum_r left_r right_r^T`` over the
rows ``r`` of its examples: for ``y = W a``, ``left`` is the gradient of the output and ``right`` the input. A
:class:`Lookup` has one-hot ``left``, given by index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.held import Held
from steppe.factored.lookups import Coalesced, Lookup, columns, times
from steppe.factored.parts import Parts


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
        """In another type."""
        source = self.source and self.source.to(dtype)
        return replace(self, left=self.left.to(dtype), right=self.right.to(dtype), source=source)

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_i c_i G_i`` over examples."""
        if self.source is not None:
            return self.source.weighted(c)  # type: ignore[no-any-return]
        left = self.left * c.to(self.left.dtype)[:, None, None]
        return left.flatten(0, 1).mT @ self.right.flatten(0, 1)

    def shape(self, parts: Parts) -> tuple[int, int, int]:
        """Rows in a part, height and width of ``G_k``."""
        return min(parts.m, parts.n) * self.left.shape[1], *self.size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.left.shape[-1], self.right.shape[-1]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What :meth:`write` wants of the parts."""
        return self.left, self.right

    @staticmethod
    def write(G: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
        """``G_k`` of some parts, or add them to what is there."""
        if G.dtype == left.dtype:
            torch.baddbmm(G, left.mT, right, beta=int(add), out=G)
        else:  # under autocast, beside a lookup
            G.add_(left.mT @ right) if add else G.copy_(left.mT @ right)

    def add_times(self, y: Tensor, x: Tensor, s: Tensor, parts: Parts) -> None:
        """``y_k += s_k (x_k, 1) G_k^T`` in place, the 1 where a bias rides along."""
        for y_k, x_k, s_k, left, right in parts.beside(y, x, s, self.left, self.right):
            y_k.baddbmm_(times(self._plus_ones(x_k @ right.to(x.dtype).mT), s_k), left.to(y.dtype))

    def add_transposed_times(self, y: Tensor, x: Tensor, s: Tensor, parts: Parts) -> None:
        """``y_k += s_k x_k G_k`` in place."""
        for y_k, x_k, s_k, left, right in parts.beside(y, x, s, self.left, self.right):
            y_k.baddbmm_(times(x_k @ left.to(x.dtype).mT, s_k), right.to(y.dtype))

    def rows(self, index: Tensor, parts: Parts) -> list[Tensor]:
        """``G_k[index]`` by chunk, for indices of ``(n, q)``."""
        return [columns(left, i).mT @ right for i, left, right in parts.beside(index, self.left, self.right)]

    def _plus_ones(self, products: Tensor) -> Tensor:
        return products if self.bias is None else products.add_(1)


Term = Dense | Lookup


@dataclass
class Factored:
    """Every micro-batch's gradient of one matrix as factors: a sum of terms, one a use of the parameter."""

    terms: Sequence[Term]
    parts: Parts

    @property
    def bias(self) -> int | None:
        """The parameter whose gradient rides along."""
        return next((term.bias for term in self.terms if isinstance(term, Dense)), None)

    def rows(self, index: Tensor) -> Tensor:
        """``G_k[index]`` for indices of ``(n, q)``: ``(n, q, columns)``."""
        with uncast(index):
            made = [term.rows(index, self.parts) for term in self.terms]
        return self.parts.join([sum(chunk[1:], chunk[0]) for chunk in zip(*made, strict=True)], index.shape[1])

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_k c_k G_k`` over parts of one example each."""
        made = [term.weighted(c) for term in self.terms]
        return sum(made[1:], made[0])

    def weighted_bias(self, c: Tensor) -> Tensor:
        """The same of the bias that rides along."""
        (term,) = self.terms
        assert isinstance(term, Dense)
        return c.to(term.left.dtype) @ term.left.sum(1)


Gradient = Factored | Held | Coalesced


def squared_norms(gradients: Iterable[Gradient], small: Iterable[Tensor]) -> Tensor:
    """``norm(G_k)^2`` over all of these parameters together, shape ``(k,)``, in at least float32."""
    gradients, small = list(gradients), list(small)
    factored = [g for g in gradients if isinstance(g, Factored)]
    found = [g.squares() for g in gradients if not isinstance(g, Factored)]
    if small:
        found.append(wide(torch.cat([t.flatten(1) for t in small], 1)).square().sum(1))
    if factored:
        found.append(_squares_of_factors(factored))
    return sum(found[1:], found[0])


def _squares_of_factors(gradients: Sequence[Factored]) -> Tensor:
    square, size = _grams(gradients)
    noise = size * (1e-3 if square.dtype == torch.float32 else 1e-9)
    if square.device.type != "cpu":
        return torch.maximum(square, noise * 1e-3)  # a wait for the device would be dearer than a short step
    if bool((square < noise).any()):  # examples cancel: what is left drowns in rounding
        square, _ = _grams([replace(g, terms=[term.to(torch.float64) for term in g.terms]) for g in gradients])
    return square.to(size.dtype)


def _grams(gradients: Iterable[Factored]) -> tuple[Tensor, Tensor]:
    """``sum <G_k, G_k>``, shape ``(k,)``, without any ``G_k``; and the size of what was summed."""
    parts: Parts | None = None
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
    return parts.together(squares), parts.together(sizes)  # type: ignore[arg-type]


def _add_product(total: Tensor | None, left: Tensor, right: Tensor, times: int) -> Tensor:
    if total is None:
        return left * right if times == 1 else left * right * times
    return total.addcmul_(left, right, value=times)


def gram(a: Term, b: Term, parts: Parts) -> list[tuple[Tensor, Tensor]]:
    """Products of rows by chunk: ``<G_k of a, G_k of b>`` is the sum of left times right."""
    right = [x @ y.mT for x, y in parts.beside(a.right, b.right)]
    if isinstance(a, Dense) and a.bias is not None:
        right = [r.add_(1) for r in right]
    return list(zip(_left_products(a, b, parts), right, strict=True))


def _left_products(a: Term, b: Term, parts: Parts) -> list[Tensor]:
    match a, b:
        case Dense(), Dense():
            return [x @ y.mT for x, y in parts.beside(a.left, b.left)]
        case Dense(), Lookup():
            return [columns(x, j) for x, j in parts.beside(a.left, b.index)]
        case Lookup(), Dense():
            return [p.mT for p in _left_products(b, a, parts)]
        case Lookup(), Lookup():
            return [(i[:, :, None] == j[:, None, :]).to(a.right.dtype) for i, j in parts.beside(a.index, b.index)]
    raise TypeError((a, b))


@dataclass(frozen=True)
class Product:
    """``x_k -> s_k x_k G_k^T`` with ``G_k`` as factors; ``turned`` where ``G_k`` is a gradient of ``W^T``."""

    gradient: Factored
    scale: Tensor
    turned: bool = False

    def add(self, y: Tensor, x: Tensor, back: bool = False) -> None:
        """``y_k += s_k x_k G_k^T`` in place, for ``y`` and ``x`` of ``(n, q, ...)``; with ``back``, ``G_k``."""
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
    """Products inside are in the types of their operands, also under autocast."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
