"""Convolutions: every micro-batch one group of a grouped convolution, or patches as rows of a matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.cost import Cost
from steppe.factored.linear import low
from steppe.factored.parts import Parts
from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small
from steppe.factored.terms import Dense, Product

LOOP = 8  # inputs in a part from which one convolution a part is faster than a group a part, which copies


@dataclass(frozen=True)
class Spec:
    """Stride, padding and dilation by dimension, groups, and the weight's shape."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shape: torch.Size

    def backward(self, delta: Tensor, x: Tensor, W: Tensor, groups: int, mask: list[bool]) -> Any:
        """Gradients of input and weight, as ``mask`` asks."""
        zero = [0] * len(self.stride)
        where = (self.stride, self.padding, self.dilation, False, zero, groups, [*mask, False])
        return torch.ops.aten.convolution_backward(delta, x, W, None, *where)

    def forward(self, x: Tensor, W: Tensor, groups: int, b: Tensor | None = None) -> Tensor:
        """The convolution."""
        zero = [0] * len(self.stride)
        return torch.convolution(x, W, b, self.stride, self.padding, self.dilation, False, zero, groups)


def side_by_side(x: Tensor, k: int) -> Tensor:
    """``(k m, C, ...)`` as ``(m, k C, ...)``: the parts' channels beside each other."""
    m = len(x) // k
    return x.reshape(k, m, *x.shape[1:]).transpose(0, 1).reshape(m, -1, *x.shape[2:])


def below(y: Tensor, k: int) -> Tensor:
    """The inverse of :func:`side_by_side`."""
    return y.reshape(len(y), k, -1, *y.shape[2:]).transpose(0, 1).reshape(len(y) * k, -1, *y.shape[2:])


@dataclass(frozen=True)
class Convolved:
    """A convolution's term: ``x`` ``(n, q, C, ...)`` and ``left`` ``(n, q, C_out, ...)``, ``q`` inputs an example."""

    x: Tensor
    left: Tensor
    spec: Spec

    def shape(self, parts: Parts) -> tuple[int, int, int]:
        """Rows in a part, height and width of ``G_k``."""
        rows = min(parts.m, parts.n) * self.left[0, :, 0].numel()
        return rows, self.spec.shape[0], self.spec.shape[1:].numel()

    def full(self, parts: Parts) -> list[Tensor]:
        """``G_k`` by chunk: ``(parts, C_out, C_in / groups * kernel)``."""
        made = []
        for x, delta in zip(parts.chunks(self.x), parts.chunks(self.left), strict=True):
            k = len(x)
            if x.shape[1] >= LOOP:
                W = delta.new_empty(1).expand(self.spec.shape)  # for its shape alone
                G = [
                    self.spec.backward(d, a, W, self.spec.groups, [False, True])[1]
                    for d, a in zip(delta, x, strict=True)
                ]
                made.append(torch.stack(G).reshape(k, self.spec.shape[0], -1))
                continue
            W = delta.new_empty(1).expand(k * self.spec.shape[0], *self.spec.shape[1:])
            x, delta = side_by_side(x.flatten(0, 1), k), side_by_side(delta.flatten(0, 1), k)
            whole = self.spec.backward(delta, x, W, k * self.spec.groups, [False, True])[1]
            made.append(whole.reshape(k, self.spec.shape[0], -1))
        return made

    def dense(self) -> Dense:
        """The same as a product of patches."""
        left = self.left.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)
        patches = unfolded(self.x.flatten(0, 1), self.spec)
        return Dense(left, patches.reshape(len(self.x), -1, patches.shape[-1]))


def unfolded(x: Tensor, spec: Spec) -> Tensor:
    """The patches of a 2-D convolution: ``(inputs, positions, C_in kernel)``."""
    return F.unfold(x, spec.shape[2:], spec.dilation, spec.padding, spec.stride).mT


class PartwiseConv(torch.autograd.Function):
    """``conv(x_k, P_k) + b_k``: to ``x`` gradients go through ``P_k``, to ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, P: Tensor, b_k: Tensor | None, W: Tensor, b: Tensor | None, spec: Spec) -> Tensor:
        """``x``: ``(k m, C, ...)``; ``P``: ``(k, *W.shape)``; ``b_k``: ``(k, C_out)``."""
        ctx.save_for_backward(x, P)
        ctx.spec, ctx.dtype = spec, W.dtype
        k = len(P)
        if len(x) // k >= LOOP:
            biases = [None] * k if b_k is None else b_k
            parts = zip(x.chunk(k), P, biases, strict=True)
            return torch.cat([spec.forward(a, p, spec.groups, c) for a, p, c in parts])
        bias = None if b_k is None else b_k.flatten()
        return below(spec.forward(side_by_side(x, k), P.flatten(0, 1), k * spec.groups, bias), k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``W`` and ``b``."""
        x, P = ctx.saved_tensors
        spec, k, dx, dW = ctx.spec, len(P), None, None
        if ctx.needs_input_grad[0] and len(x) // k >= LOOP:
            rows = zip(delta.chunk(k), x.chunk(k), P, strict=True)
            dx = torch.cat([spec.backward(d, a, p, spec.groups, [True, False])[0] for d, a, p in rows])
        elif ctx.needs_input_grad[0]:
            shape = x.new_empty(1).expand(len(x) // k, k * x.shape[1], *x.shape[2:])  # read for its shape alone
            d, groups = side_by_side(delta, k), k * spec.groups
            dx = below(spec.backward(d, shape, P.flatten(0, 1), groups, [True, False])[0], k)
        if ctx.needs_input_grad[3]:
            dW = spec.backward(delta, x, P[0], spec.groups, [False, True])[1].to(ctx.dtype)
        db = delta.flatten(2).sum((0, 2), dtype=ctx.dtype) if ctx.needs_input_grad[4] else None
        return dx, None, None, dW, db, None


class Conv:
    """``y = conv(x, W) + b`` in one, two or three dimensions."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def read(
        self,
        x: Tensor,
        W: Tensor,
        b: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None, Spec]:
        """The arguments, with one number a dimension."""

        def each(v: Any) -> tuple[int, ...]:
            return (v,) * self.dims if isinstance(v, int) else tuple(v) * (self.dims // len(v))

        if isinstance(padding, str):
            reach = [d * (size - 1) for d, size in zip(each(dilation), W.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                raise CannotFactor("a convolution with padding='same' and an even kernel has no factored form")
            padding = tuple(r // 2 for r in reach) if padding == "same" else 0
        return x, W, b, Spec(each(stride), each(padding), each(dilation), groups, W.shape)

    def look(self, look: Look, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the input."""
        x, W, b, spec = self.read(*args, **kwargs)
        weight, bias = look.tracked.index(W), look.tracked.index(b)
        if (weight is None and bias is None) or x.dim() != self.dims + 2:
            return NotImplemented
        y = func(*args, **kwargs)
        kept = None if weight is None else x.detach().to(y.dtype)
        return look.record(y, Site(self, weight, bias, kept, (len(x),), (spec,)))

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """The term of the weight and the sums of the bias."""
        delta = site.delta
        if site.weight is not None:
            term = Convolved(site.by_example(site.kept), delta, site.static[0])  # type: ignore[arg-type]
            matrices.setdefault(site.weight, []).append(term)
        if site.bias is not None:
            small.setdefault(site.bias, []).append(delta.flatten(3).sum((1, 3)))

    def see(self, see: See, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Each micro-batch with its own weights."""
        x, W, b, spec = self.read(*args, **kwargs)
        weight, bias = see.tracked.index(W), see.tracked.index(b)
        if (weight is None and bias is None) or x.dim() != self.dims + 2:
            return NotImplemented
        site = see.next(self, weight, bias)
        x = x.to(low(x))
        if weight is None:
            y = func(x, W, None, spec.stride, spec.padding, spec.dilation, spec.groups)
            rows = see.rows_of(site, b, bias, y.shape[:1])  # type: ignore[arg-type]
            return (y + rows.reshape(*rows.shape, *[1] * self.dims)).to(x.dtype)
        see_with = self.with_held if see.matrix(site)[0].whole else self.with_patches
        return see_with(see, site, x, W, b, spec)

    def with_held(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec) -> Tensor:
        """``conv(x, W + eps_k) + b_k`` with ``W + eps_k`` in memory."""
        gradient, scale = see.matrix(site)
        x_e = site.by_example(x)
        P = gradient.perturbed(W, scale, x.dtype)
        biases: Any = [None] * len(P)
        if b is not None:
            biases = see.parts.split(see.of_parts(b, site.bias).to(x.dtype).expand(see.parts.k, -1))
        made = []
        for x_k, P_k, b_k in zip(see.parts.chunks(x_e), P, biases, strict=True):
            y = PartwiseConv.apply(x_k.flatten(0, 1), P_k.reshape(-1, *W.shape), b_k, W, b, spec)  # type: ignore[no-untyped-call]
            made.append(y.reshape(len(x_k), -1, *y.shape[1:]))
        return site.by_row(see.parts.join(made, x_e.shape[1]), (len(x),))

    def with_patches(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec) -> Tensor:
        """``conv(x, W) + b`` and the perturbation as a product of patches."""
        y = spec.forward(x, W.to(x.dtype), spec.groups)
        patches = site.by_example(unfolded(x, spec))  # (n, q, positions, columns)
        q, positions = patches.shape[1:3]
        extra = Extra.apply(patches.flatten(1, 2), Product(*see.matrix(site)), len(W))  # type: ignore[no-untyped-call]
        rows = site.by_row(extra.unflatten(1, (q, positions)), (len(x),))
        y = y + rows.mT.reshape(y.shape)
        if b is None:
            return y
        shift = b if site.bias is None else see.rows_of(site, b, site.bias, y.shape[:1])
        return (y + shift.reshape(*shift.shape, *[1] * self.dims)).to(x.dtype)


class Extra(torch.autograd.Function):
    """``s_k x_k G_k^T`` with ``G_k`` as factors; the gradient goes to ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, height: int) -> Tensor:
        """``x``: ``(n, q, columns)``."""
        ctx.product, ctx.width = product, x.shape[-1]
        y = x.new_zeros(*x.shape[:-1], height)
        product.add(y, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``x``."""
        dx = delta.new_zeros(*delta.shape[:-1], ctx.width)
        ctx.product.add(dx, delta, back=True)
        return dx, None, None


def settle(term: Convolved, parts: Parts, cost: Cost) -> Convolved | Dense:
    """Patches where the Gram side is the cheaper one (2-D, one group), else as it is."""
    rows, height, width = term.shape(parts)
    by_patches = term.left.dim() == 5 and term.spec.groups == 1 and not cost.whole(2 * rows, height, width)
    return term.dense() if by_patches else term
