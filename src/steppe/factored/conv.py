"""Convolutions, each micro-batch at its own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.convolved import Convolved, below, one_by_one, side_by_side
from steppe.factored.held import Held
from steppe.factored.linear import Blocks, low, own
from steppe.factored.patches import from_patches, patches
from steppe.factored.spec import Spec
from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small
from steppe.factored.terms import Product


class HeldConv(torch.autograd.Function):
    """``y_k = conv(x_k, P_k) + b_k``: ``x`` has gradients through ``P_k``, ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, weights: Blocks, b_k: Sequence[Any], spec: Spec
    ) -> Tensor:
        """``x``: ``(n, q, C, ...)``; ``b_k``: by chunk, ``(k, C_out)`` or nothing."""
        ctx.save_for_backward(x, W)
        ctx.weights, ctx.spec = weights, spec
        x_k = weights.parts.chunks(x)
        made: list[Tensor] = []
        for c, at, P in weights():
            P, a, bias = P.reshape(-1, *spec.shape), x_k[c][at], None if b_k[c] is None else b_k[c][at]
            if one_by_one(a):
                made += [spec.forward(a[i], p, spec.groups, None if bias is None else bias[i]) for i, p in enumerate(P)]
            else:
                shift = None if bias is None else bias.flatten()
                y = spec.forward(side_by_side(a), P.flatten(0, 1), len(P) * spec.groups, shift)
                made.append(below(y, len(P)))
        return own(torch.cat(made).reshape(*x.shape[:2], *made[0].shape[1:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``W`` and ``b``."""
        (x, W), weights, spec, dx, dW = ctx.saved_tensors, ctx.weights, ctx.spec, None, None
        if ctx.needs_input_grad[0]:
            x_k, delta_k, made = weights.parts.chunks(x), weights.parts.chunks(delta), []
            for c, at, P in weights():
                P, a, d = P.reshape(-1, *spec.shape), x_k[c][at], delta_k[c][at]
                if one_by_one(a):
                    parts = zip(d, a, P, strict=True)
                    made += [spec.backward(d_i, a_i, p, spec.groups, [True, False])[0] for d_i, a_i, p in parts]
                else:
                    k, like = len(P), a.new_empty(a.shape[1], len(P) * a.shape[2], *a.shape[3:])  # for its shape alone
                    whole = spec.backward(side_by_side(d), like, P.flatten(0, 1), k * spec.groups, [True, False])[0]
                    made.append(below(whole, k))
            dx = torch.cat(made).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dW = spec.weight_gradient(delta.flatten(0, 1), x.flatten(0, 1)).to(W.dtype)
        db = delta.flatten(3).sum((0, 1, 3), dtype=W.dtype) if ctx.needs_input_grad[2] else None
        return dx, dW, db, None, None, None


class FactoredConv(torch.autograd.Function):
    """``y_k = conv(x_k, W + s_k G_k)``, ``G_k`` as factors: gradients go to ``W`` as if it were ``W + s_k G_k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, product: Product, spec: Spec) -> Tensor:
        """``x``: ``(n, q, C, ...)``."""
        ctx.dtype, ctx.product, ctx.spec, W = W.dtype, product, spec, W.to(x.dtype)
        ctx.save_for_backward(x, W)
        y = spec.forward(x.flatten(0, 1), W, spec.groups)
        rows = patches(x.flatten(0, 1), spec)
        extra = rows.new_zeros(len(x), rows[0, :, 0].numel() * x.shape[1], len(W))
        product.add(extra, rows.reshape(len(x), -1, rows.shape[-1]))
        y += extra.reshape(len(y), -1, len(W)).mT.reshape(y.shape)
        return own(y.reshape(*x.shape[:2], *y.shape[1:]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x`` and ``W``."""
        (x, W), spec = ctx.saved_tensors, ctx.spec
        d, x_rows = delta.flatten(0, 1), x.flatten(0, 1)
        dx, dW, _ = spec.backward(d, x_rows, W, spec.groups, list(ctx.needs_input_grad[:2]))
        if dx is not None:
            rows = d.flatten(2).mT.reshape(len(x), -1, d.shape[1])
            seen = rows.new_zeros(*rows.shape[:2], spec.shape[1:].numel())
            ctx.product.add(seen, rows, back=True)
            dx = (dx + from_patches(seen.reshape(len(d), -1, seen.shape[-1]), x_rows.shape, spec)).reshape(x.shape)
        return dx, None if dW is None else dW.to(ctx.dtype), None, None


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
            return self.plus(see, site, func(x, W, None, spec.stride, spec.padding, spec.dilation, spec.groups), b)
        see_with = self.with_held if isinstance(see.matrices[weight][0], Held) else self.with_patches
        return see_with(see, site, x, W, b, spec)

    def with_held(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec) -> Tensor:
        """``conv(x, W + eps_k) + b_k`` with ``W + eps_k`` in memory."""
        weights = Blocks(*see.matrices[site.weight], W, x.dtype)  # type: ignore[arg-type, index]
        b_k: Sequence[Any] = [None] * len(see.parts.spans)
        if b is not None:
            b_k = see.parts.split(see.of_parts(b, site.bias).to(x.dtype))
        y: Tensor = HeldConv.apply(site.by_example(x), W, b, weights, b_k, spec)  # type: ignore[no-untyped-call]
        return site.by_row(y, (len(x),))

    def with_patches(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: Spec) -> Tensor:
        """``conv(x, W + eps_k) + b_k`` with ``eps_k`` as factors."""
        product = Product(*see.matrices[site.weight])  # type: ignore[arg-type, index]
        y: Tensor = FactoredConv.apply(site.by_example(x), W, product, spec)  # type: ignore[no-untyped-call]
        return self.plus(see, site, site.by_row(y, (len(x),)), b)

    def plus(self, see: See, site: Site, y: Tensor, b: Tensor | None) -> Tensor:
        """``y + b``, each micro-batch with its own ``b``."""
        if b is None:
            return y
        rows = b if site.bias is None else see.rows_of(site, b, site.bias, y.shape[:1])
        return (y + rows.reshape(*rows.shape, *[1] * self.dims)).to(y.dtype)
