"""A micro-batch's gradient of one parameter, held as factors.

The gradient of a matrix of shape ``(rows, columns)`` for micro-batch ``k`` is ``G_k = sum_r left_r right_r^T`` over the
rows ``r`` of its examples: for ``y = W a``, ``left`` is the gradient of the output and ``right`` the input. A
:class:`Lookup` has one-hot ``left``, given by index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.factored.parts import Parts
from steppe.vector import wide


@dataclass(frozen=True)
class Dense:
    """``left``: ``(n, q, rows)``, ``right``: ``(n, q, columns)``."""

    left: Tensor
    right: Tensor

    def double(self) -> Dense:
        """In float64."""
        return Dense(self.left.double(), self.right.double())

    def shape(self, parts: Parts) -> tuple[int, int, int]:
        """Rows in a part, height and width of ``G_k``."""
        return min(parts.m, parts.n) * self.left.shape[1], self.left.shape[-1], self.right.shape[-1]

    def full(self, parts: Parts) -> list[Tensor]:
        """``G_k`` by chunk: ``(parts, rows, columns)``."""
        pairs = zip(parts.chunks(self.left), parts.chunks(self.right), strict=True)
        return [left.mT @ right for left, right in pairs]

    def times(self, x: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``x G_k^T`` by chunk, for ``x`` of ``(parts, rows of x, columns)``."""
        return [(x_k @ right.mT) @ left for x_k, left, right in self._with(x, parts)]

    def transposed_times(self, x: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``x G_k`` by chunk, for ``x`` of ``(parts, rows of x, rows)``."""
        return [(x_k @ left.mT) @ right for x_k, left, right in self._with(x, parts)]

    def rows(self, index: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``G_k[index]`` by chunk, for indices of ``(parts, rows of x)``."""
        return [_columns(left, i).mT @ right for i, left, right in self._with(index, parts)]

    def _with(self, x: Sequence[Tensor], parts: Parts) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(zip(x, parts.chunks(self.left), parts.chunks(self.right), strict=True))


@dataclass(frozen=True)
class Lookup:
    """``G_k[index_r] += right_r``; ``index``: ``(n, q)``, ``right``: ``(n, q, columns)``, ``height`` rows."""

    index: Tensor
    right: Tensor
    height: int

    def double(self) -> Lookup:
        """In float64."""
        return Lookup(self.index, self.right.double(), self.height)

    def full(self, parts: Parts) -> list[Tensor]:
        """``G_k`` by chunk: ``(parts, height, columns)``."""
        made = []
        for index, right in zip(parts.chunks(self.index), parts.chunks(self.right), strict=True):
            zero = right.new_zeros(len(right), self.height, right.shape[-1])
            made.append(zero.scatter_add(1, index[..., None].expand_as(right), right))
        return made

    def times(self, x: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``x G_k^T`` by chunk: ``(parts, rows of x, height)``."""
        made = []
        for x_k, index, right in zip(x, parts.chunks(self.index), parts.chunks(self.right), strict=True):
            products = x_k @ right.mT
            zero = products.new_zeros(*products.shape[:2], self.height)
            made.append(zero.scatter_add(2, index[:, None].expand_as(products), products))
        return made

    def transposed_times(self, x: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``x G_k`` by chunk."""
        pairs = zip(x, parts.chunks(self.index), parts.chunks(self.right), strict=True)
        return [_columns(x_k, index) @ right for x_k, index, right in pairs]

    def rows(self, index: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """``G_k[index]`` by chunk."""
        mine = zip(index, parts.chunks(self.index), parts.chunks(self.right), strict=True)
        return [(i[:, :, None] == j[:, None, :]).to(right.dtype) @ right for i, j, right in mine]


Term = Dense | Lookup


def gram(a: Term, b: Term, parts: Parts) -> tuple[Tensor, Tensor]:
    """``<G_k of a, G_k of b>`` for every part, shape ``(k,)``, without either; and the size of what was summed."""
    left = _left_products(a, b, parts)
    right = [x @ y.mT for x, y in zip(parts.chunks(a.right), parts.chunks(b.right), strict=True)]
    products = [wide(l) * wide(r) for l, r in zip(left, right, strict=True)]  # noqa: E741
    sums = torch.cat([p.sum((1, 2)) for p in products])
    return sums, torch.cat([torch.linalg.vector_norm(p, 1, (1, 2)) for p in products])


def _left_products(a: Term, b: Term, parts: Parts) -> list[Tensor]:
    match a, b:
        case Dense(), Dense():
            return [x @ y.mT for x, y in zip(parts.chunks(a.left), parts.chunks(b.left), strict=True)]
        case Dense(), Lookup():
            return [_columns(x, j) for x, j in zip(parts.chunks(a.left), parts.chunks(b.index), strict=True)]
        case Lookup(), Dense():
            return [p.mT for p in _left_products(b, a, parts)]
        case Lookup(), Lookup():
            pairs = zip(parts.chunks(a.index), parts.chunks(b.index), strict=True)
            return [(i[:, :, None] == j[:, None, :]).to(a.right.dtype) for i, j in pairs]
    raise TypeError((a, b))


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]`` for every part: ``(parts, rows of x, rows)``."""
    return x.gather(2, index[:, None].expand(-1, x.shape[1], -1))


@dataclass
class Gradient:
    """Every micro-batch's gradient of one matrix: a sum of terms, one a use of the parameter.

    ``whole`` says whether the gradients are held whole or stay factors: a cost rule, from shapes alone.
    """

    terms: list[Term]
    parts: Parts
    whole: bool
    _full: list[Tensor] | None = None
    _weights: list[Tensor] | None = None

    def squares(self) -> Tensor:
        """``norm(G_k)^2``, shape ``(k,)``, in at least float32."""
        if self.whole:
            return torch.cat([_squares(g) for g in self.full()])
        square, size = self._gram(self.terms)
        noise = size * (1e-3 if square.dtype == torch.float32 else 1e-9)
        if square.device.type != "cpu":
            return torch.maximum(square, noise * 1e-3)  # a wait for the device would be dearer than a short step
        if bool((square < noise).any()):  # examples cancel: what is left drowns in rounding
            square, _ = self._gram([term.double() for term in self.terms])
        return square.to(size.dtype)

    def _gram(self, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
        pairs = [(a, b, 1 if a is b else 2) for i, a in enumerate(terms) for b in terms[: i + 1]]
        found = [(gram(a, b, self.parts), times) for a, b, times in pairs]
        square: Tensor = sum(times * s for (s, _), times in found)  # type: ignore[assignment]
        size: Tensor = sum(times * z for (_, z), times in found)  # type: ignore[assignment]
        return square, size

    def full(self) -> list[Tensor]:
        """``G_k`` by chunk, made once."""
        if self._full is None:
            sums = [term.full(self.parts) for term in self.terms]
            self._full = [sum(chunk[1:], chunk[0]) for chunk in zip(*sums, strict=True)]
        return self._full

    def settle(self) -> None:
        """Let go of the factors where the gradients are held whole."""
        if self.whole:
            self.full()
            self.terms = []

    def perturbed(self, W: Tensor, scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """``W + scale_k G_k`` by chunk, made once, in the memory of ``G_k``."""
        if self._weights is None:
            with torch.no_grad():
                pairs = zip(self.full(), self.parts.split(scale.to(W.dtype)), strict=True)
                self._weights = [_plus(W, g, s[:, None, None]) for g, s in pairs]
            self._full = None
        return [P.to(dtype) for P in self._weights]

    def apply(self, how: Callable[[Term], list[Tensor]]) -> list[Tensor]:
        """``how`` of every term, summed, by chunk."""
        made = [how(term) for term in self.terms]
        return [sum(chunk[1:], chunk[0]) for chunk in zip(*made, strict=True)]


def _plus(W: Tensor, G: Tensor, s: Tensor) -> Tensor:
    W = W.detach().reshape(G.shape[1:])
    return torch.addcmul(W, G, s, out=G) if G.dtype == W.dtype else W + s * G


def _squares(g: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=wide(g[:0]).dtype)
    return norms.square()


def cheaper_whole(rows: int, height: int, width: int, products: int = 3) -> bool:
    """Whether to hold ``G_k`` (``height x width``) rather than its factors (``rows`` of each in a part).

    Per part, factors cost ``rows^2 (height + width)`` multiplications for each of up to three products: the Gram
    matrices, the perturbed forward and its backward. Holding costs ``rows height width`` to make and some passes over
    ``height width`` numbers in memory, together worth about 50 multiplications each.
    """
    return products * rows * rows * (height + width) > (rows + 50) * height * width
