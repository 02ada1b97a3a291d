"""The gradients ``G_k`` of one matrix for every micro-batch: whole, as factors, or by the rows that occur.

Each kind offers the same: ``squares``, the norms; ``weighted``, a weighted sum; ``apply`` and ``input_gradient``, which
evaluate a map at ``W + s_k G_k``.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.engine.vector import wide
from steppe.factored.maps import Conv, Dense, Map, Use, add_product, as_one, dot, weight_gradient
from steppe.factored.microbatches import MicroBatches
from steppe.factored.sites import Site


class Whole:
    """``G_k`` in memory; the second pass turns it into ``W + s_k G_k``, in place where the dtypes allow."""

    def __init__(self, uses: Sequence[Use], parts: MicroBatches) -> None:
        first, m = uses[0], min(parts.m, parts.n)
        self.parts = parts.in_blocks(first.map.block(first.x, m)) if isinstance(first.map, Conv) else parts
        self.chunks: list[Tensor] = []  # (k of the chunk, height, width)
        self._perturbed = 0  # chunks
        norms = []
        for chunk in zip(*(self.parts.zip(use.delta, use.x) for use in uses), strict=True):
            G = _sum(use.map.gradients(delta, x) for use, (delta, x) in zip(uses, chunk, strict=True))
            norms.append(torch.linalg.vector_norm(G.flatten(1), dim=1, dtype=wide(G[:0]).dtype))
            self.chunks.append(G)
        self.squares = parts.cat(norms).square()  # norm(G_k)^2, shape (k,), in at least float32

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_k c_k G_k`` over micro-batches of one example each."""
        sums = (c_k.to(G.dtype) @ G.flatten(1) for c_k, G in zip(self.parts.split(c), self.chunks, strict=True))
        return _sum(sums).reshape(self.chunks[0].shape[1:])

    def weights(self, W: Tensor, s: Tensor, dtype: torch.dtype) -> Iterable[Tensor]:
        """Return ``W + s_k G_k`` by chunk, ``(k, height, width)``; ``W`` and ``s`` are those of the first call."""
        if self._perturbed == len(self.chunks):
            return self.chunks if self.chunks[0].dtype == dtype else [P.to(dtype) for P in self.chunks]
        return self._perturb(W, s, dtype)

    def _perturb(self, W: Tensor, s: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield each chunk when it is made, while it is in a CPU's cache."""
        W, scales = W.reshape(self.chunks[0].shape[1:]), self.parts.split(s.to(W.dtype)[:, None, None])
        for i, (G, s_k) in enumerate(zip(self.chunks, scales, strict=True)):
            if G.dtype != W.dtype:
                yield torch.addcmul(W, G.to(W.dtype), s_k).to(dtype)
                continue
            if i >= self._perturbed:
                torch.addcmul(W, G, s_k, out=G)
                self._perturbed += 1
            yield G.to(dtype)

    def apply(
        self, map: Map, x: Tensor, W: Tensor, s: Tensor, b: Tensor | None = None, b_eps: Tensor | None = None
    ) -> Tensor:
        """Return the output of the map at ``W + s_k G_k`` and ``b + b_eps_k``."""
        biases: Sequence[Tensor | None] = [None] * len(self.chunks)
        if b is not None:
            b_k = b.expand(self.parts.k, -1) if b_eps is None else b + b_eps.to(b.dtype)
            biases = self.parts.split(b_k.to(x.dtype))
        P_k = self.weights(W, s, x.dtype if x.is_floating_point() else W.dtype)
        made = [map.apply(x_k, P, b_k) for x_k, P, b_k in zip(self.parts.chunks(x), P_k, biases, strict=True)]
        return self.parts.join(made, x.shape[1])

    def input_gradient(self, map: Dense | Conv, d: Tensor, x: Tensor, W: Tensor, s: Tensor) -> Tensor:
        """Return the gradient of the map's input at ``W + s_k G_k``."""
        P_k = self.weights(W, s, x.dtype)
        made = [map.input_gradient(d_k, x_k, P) for (d_k, x_k), P in zip(self.parts.zip(d, x), P_k, strict=True)]
        return self.parts.join(made, x.shape[1])


class Factors:
    """``G_k = sum left_k^T right_k``, a term for each use, never formed.

    With ``bias``, the index of a parameter, ``right`` has one more column, of ones, which is not stored: the
    gradient of the bias. This saves 7 to 9 % of a step on networks of small layers.
    """

    def __init__(self, uses: Sequence[Use], parts: MicroBatches, bias: int | None = None) -> None:
        types = {use.delta.dtype for use in uses}
        if len(types) > 1 or torch.float16 in types:  # products need one dtype; in float16 they overflow at 65504
            uses = [use.to(torch.float32) for use in uses]
        self.uses, self.parts, self.bias = uses, parts, bias
        self.terms = [use.map.factors(use.x, use.delta) for use in uses]

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_i c_i G_i`` over micro-batches of one example each."""
        return _sum(use.weighted(c) for use in self.uses)

    def weighted_bias(self, c: Tensor) -> Tensor:
        """Return the same sum for the bias."""
        ((left, _),) = self.terms
        return c.to(left.dtype) @ left.sum(1)

    def apply(
        self, map: Map, x: Tensor, W: Tensor, s: Tensor, b: Tensor | None = None, b_eps: Tensor | None = None
    ) -> Tensor:
        """Return the output of the map at ``W + s_k G_k`` and ``b + b_eps_k``."""
        dtype = x.dtype if x.is_floating_point() else W.dtype
        y = map.apply(as_one(x), W.to(dtype)[None], None if b is None else b.to(dtype)[None])
        y = y.reshape(*x.shape[:2], *y.shape[2:])
        map.add_output(y, x, lambda to, rows: self._add(to, rows, s, map.turned))
        if b_eps is not None:
            y += self.parts.spread(b_eps).to(dtype).reshape(len(y), 1, -1, *[1] * (y.dim() - 3))
        return y

    def input_gradient(self, map: Dense | Conv, d: Tensor, x: Tensor, W: Tensor, s: Tensor) -> Tensor:
        """Return the gradient of the map's input at ``W + s_k G_k``."""
        dx = map.input_gradient(as_one(d), as_one(x), W.to(d.dtype)[None]).reshape(x.shape)
        map.add_input_gradient(dx, d, lambda to, rows: self._add(to, rows, s, not map.turned, ones=False))
        return dx

    def _add(self, y: Tensor, x: Tensor, s: Tensor, turned: bool, ones: bool = True) -> None:
        """Add ``s_k x_k G_k^T`` to ``y_k`` in place, or ``turned`` ``s_k x_k G_k``; ``x`` and ``y`` are rows."""
        assert y.is_contiguous()  # else its parts would be copies
        low = y.dtype == torch.float16  # sums end at 65504
        to, x = (torch.zeros_like(y, dtype=torch.float32), x.float()) if low else (y, x)
        with uncast(x):
            for left, right in self.terms:
                into, out = (left, right) if turned else (right, left)
                for y_k, x_k, s_k, into_k, out_k in self.parts.zip(to, x, s, into, out):
                    products = dot(x_k, into_k)
                    if ones and self.bias is not None:
                        products += 1
                    s_k = s_k[:, None, None]
                    in_place = products.dtype == s_k.dtype == y_k.dtype
                    add_product(y_k, products.mul_(s_k) if in_place else (products * s_k).to(y_k.dtype), out_k)
        if low:
            y += to


class Rows:
    """``G_k`` of a table that is only looked up: the sums of the rows that occur in micro-batch ``k``.

    There is space for as many rows as there are lookups; those of the same micro-batch and index are added up, and the
    rest stay zero. So all sizes are known without a wait for the device.
    """

    def __init__(self, uses: Sequence[Use], parts: MicroBatches) -> None:
        self.parts, self.height = parts, uses[0].shape[1]
        right = torch.cat([use.map.factors(use.x, use.delta)[1].flatten(0, 1) for use in uses])
        keys, order = torch.cat([self._keys(use.x).flatten() for use in uses]).sort()
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        place = first.cumsum(0) - 1
        beyond = parts.n * self.height
        self.keys = torch.full_like(keys, beyond).scatter_(0, place, keys)  # ascending, without repeats; then `beyond`
        self.sums = torch.zeros_like(right).index_add_(0, place, right[order])
        self.part = (self.keys // self.height).clamp_max(parts.k - 1)
        squares = wide(self.sums).square().sum(1)
        self.squares = squares.new_zeros(parts.k).index_add_(0, self.part, squares)  # norm(G_k)^2, shape (k,)

    def _keys(self, index: Tensor) -> Tensor:
        part = self.parts.spread(torch.arange(self.parts.k, device=index.device))
        return part.reshape(-1, *[1] * (index.dim() - 1)) * self.height + index

    def weighted(self, c: Tensor) -> Tensor:
        """Return ``sum_k c_k G_k``."""
        rows = self.sums * c.to(self.sums.dtype)[self.part][:, None]
        return rows.new_zeros(self.height, rows.shape[1]).index_add_(0, self.keys % self.height, rows)

    def apply(
        self, map: Map, x: Tensor, W: Tensor, s: Tensor, b: Tensor | None = None, b_eps: Tensor | None = None
    ) -> Tensor:
        """Return ``W[x] + s_k G_k[x]``."""
        return W[x] + self.parts.spread(s)[:, None, None].to(W.dtype) * self.rows(x)

    def rows(self, index: Tensor) -> Tensor:
        """Return ``G_k[index]`` for indices of ``(n, q)``: ``(n, q, width)``."""
        keys = self._keys(index)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return torch.where((self.keys[place] == keys)[..., None], self.sums[place], 0)


Gradient = Whole | Factors | Rows


class PerturbedMap(torch.autograd.Function):
    """``y_k = B(x_k, W + s_k G_k) + b + b_eps_k``: gradients flow to ``x`` through it, to ``W`` and ``b`` unchanged.

    The site tells which rows of ``x`` and ``y`` belong to which example; ``b_eps`` is ``(k, height)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        b_eps: Tensor | None,
        site: Site,
        map: Map,
        gradient: Gradient,
        s: Tensor,
    ) -> Tensor:
        """Return the output for ``x``, whose examples lie as at the site."""
        ctx.save_for_backward(x, W)
        ctx.site, ctx.map, ctx.gradient, ctx.s = site, map, gradient, s
        return no_view(site.by_row(gradient.apply(map, site.by_example(x), W, s, b, b_eps)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``W`` and ``b``."""
        (x, W), needed, dx, dW, db = ctx.saved_tensors, ctx.needs_input_grad, None, None, None
        x, d = ctx.site.by_example(x), ctx.site.by_example(d)
        if needed[0]:
            dx = ctx.site.by_row(ctx.gradient.input_gradient(ctx.map, d, x, W, ctx.s))
        if needed[1]:
            dW = weight_gradient(ctx.map, d, x).reshape(W.shape).to(W.dtype)
        if needed[2]:
            db = d.sum([i for i in range(d.dim()) if i != 2], dtype=W.dtype)
        return dx, dW, db, *[None] * 5


def no_view(y: Tensor) -> Tensor:
    """Return the result of an autograd function so that the model may change it in place; views may not be."""
    return same_memory(y) if y._is_view() else y


def same_memory(y: Tensor) -> Tensor:
    """Return a tensor in the memory of ``y`` that autograd does not know as a view of it."""
    made: Tensor = y.new_empty(0).set_(y)  # type: ignore[call-overload]
    return made


def squared_norms(gradients: Iterable[Gradient], small: Iterable[Tensor]) -> Tensor:
    """Return ``norm(G_k)^2`` over all of these parameters together, shape ``(k,)``, in at least float32."""
    gradients, small = list(gradients), list(small)
    factored = [g for g in gradients if isinstance(g, Factors)]
    found = [g.squares for g in gradients if not isinstance(g, Factors)]
    if small:
        found.append(wide(torch.cat([t.reshape(t.shape[0], -1) for t in small], 1)).square().sum(1))
    if factored:
        found.append(_squares_of_factors(factored))
    return _sum(found)


def _squares_of_factors(gradients: Sequence[Factors]) -> Tensor:
    square, size = _grams(gradients)
    noise = size * (1e-3 if square.dtype == torch.float32 else 1e-9)
    if square.device.type != "cpu":
        return torch.maximum(square, noise * 1e-3)  # a shorter step is better than a wait for the device
    if bool((square < noise).any()):  # examples cancel, and rounding would hide the rest
        exact = [Factors([use.to(torch.float64) for use in g.uses], g.parts, g.bias) for g in gradients]
        square, _ = _grams(exact)
    return square.to(size.dtype)


def _grams(gradients: Iterable[Factors]) -> tuple[Tensor, Tensor]:
    """Return ``sum <G_k, G_k>`` from Gram matrices, shape ``(k,)``, and the sum of their absolute values."""
    parts: MicroBatches | None = None
    total: dict[Any, Tensor] = {}  # products of equal shape are added before they are summed
    for g in gradients:
        parts = g.parts
        for i, a in enumerate(g.terms):
            for b in g.terms[: i + 1]:
                for chunk, (a_left, a_right, b_left, b_right) in enumerate(parts.zip(*a, *b)):
                    right = dot(a_right, b_right)
                    right = wide(right if g.bias is None else right.add_(1))
                    left = dot(a_left, b_left).to(right.dtype)
                    key, times = (chunk, left.shape), 1 if a is b else 2
                    known = total.get(key)
                    total[key] = left * right * times if known is None else known.addcmul_(left, right, value=times)
    assert parts is not None
    by_chunk = [[p for (chunk, _), p in total.items() if chunk == i] for i in range(len(parts.spans))]
    squares = [_sum(p.sum((1, 2)) for p in products) for products in by_chunk]
    sizes = [_sum(torch.linalg.vector_norm(p, 1, (1, 2)) for p in products) for products in by_chunk]
    return parts.cat(squares), parts.cat(sizes)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, tensors)


def uncast(t: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their operands, also under autocast."""
    device = t.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
