"""Matrix products, convolutions and look-ups in which each micro-batch has its own weights, as autograd functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.gradients import Product, Whole
from steppe.factored.maps import below, one_by_one, side_by_side
from steppe.factored.microbatches import MicroBatches
from steppe.factored.patches import ConvSpec, from_patches, patches


def own(y: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: autograd forbids in-place changes of a returned view."""
    return y.new_empty(0).set_(y)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Blocks:
    """``P_k = W + s_k G_k`` block by block; ``turned`` where ``G_k`` is a gradient of ``W^T``."""

    gradient: Whole
    scale: Tensor
    W: Tensor
    dtype: torch.dtype
    turned: bool = False

    @property
    def parts(self) -> MicroBatches:
        """The micro-batches."""
        return self.gradient.parts

    def __call__(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield the chunk, parts of the chunk and their weights, ``(parts, height, columns)``."""
        for c, at, P in self.gradient.perturbed(self.W.mT if self.turned else self.W, self.scale, self.dtype):
            yield c, at, P.mT if self.turned else P


class HeldLinear(torch.autograd.Function):
    """``y_k = x_k P_k^T + b_k``: to ``x`` gradients go through ``P_k``, to ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, weights: Blocks, b_k: Sequence[Any]) -> Tensor:
        """Compute the output for ``x``: ``(n, q, columns)``; ``b_k``: by chunk, ``(k, 1, height)`` or nothing."""
        ctx.save_for_backward(x)
        ctx.dtype, ctx.weights = W.dtype, weights
        y = x.new_empty(*x.shape[:2], len(W))
        x_k, y_k = weights.parts.chunks(x), weights.parts.chunks(y)
        for c, at, P in weights():
            if b_k[c] is None:
                torch.bmm(x_k[c][at], P.mT, out=y_k[c][at])
            else:
                torch.baddbmm(b_k[c][at], x_k[c][at], P.mT, out=y_k[c][at])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``W`` and ``b``."""
        (x,), weights, dx = ctx.saved_tensors, ctx.weights, None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            dx_k, delta_k = weights.parts.chunks(dx), weights.parts.chunks(delta)
            for c, at, P in weights():
                torch.bmm(delta_k[c][at], P, out=dx_k[c][at])
        return dx, *of_parameters(ctx, delta, x, ctx.needs_input_grad[1:3]), None, None


class FactoredLinear(torch.autograd.Function):
    """``y_k = x_k (W + s_k G_k)^T + b_k``, ``G_k`` as factors: gradients go to ``W`` as if it were ``W + s_k G_k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, product: Product, b_eps: Tensor | None) -> Tensor:
        """Compute the output for ``x``: ``(n, q, columns)``; ``b_eps``: ``(n, 1, height)``, unless in ``product``."""
        ctx.dtype, ctx.product, W = W.dtype, product, W.to(x.dtype)
        ctx.save_for_backward(x, W)
        y = F.linear(x, W, None if b is None else b.to(x.dtype))
        product.add(y, x)
        return own(y if b_eps is None else y.add_(b_eps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``W`` and ``b``."""
        x, W = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = delta @ W
            ctx.product.add(dx, delta, back=True)
        return dx, *of_parameters(ctx, delta, x, ctx.needs_input_grad[1:3]), None, None


def of_parameters(ctx: Any, delta: Tensor, x: Tensor, needed: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of ``W`` and ``b`` by the usual products over the whole batch."""
    dW = (delta.flatten(0, 1).mT @ x.flatten(0, 1)).to(ctx.dtype) if needed[0] else None
    return dW, delta.sum((0, 1), dtype=ctx.dtype) if needed[1] else None


class HeldConv(torch.autograd.Function):
    """``y_k = conv(x_k, P_k) + b_k``: ``x`` has gradients through ``P_k``, ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, weights: Blocks, b_k: Sequence[Any], spec: ConvSpec
    ) -> Tensor:
        """Compute the output for ``x``: ``(n, q, C, ...)``; ``b_k``: by chunk, ``(k, C_out)`` or nothing."""
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
        """Return the gradients of ``x``, ``W`` and ``b``."""
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
    def forward(ctx: Any, x: Tensor, W: Tensor, product: Product, spec: ConvSpec) -> Tensor:
        """Compute the output for ``x``: ``(n, q, C, ...)``."""
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
        """Return the gradients of ``x`` and ``W``."""
        (x, W), spec = ctx.saved_tensors, ctx.spec
        d, x_rows = delta.flatten(0, 1), x.flatten(0, 1)
        dx, dW, _ = spec.backward(d, x_rows, W, spec.groups, list(ctx.needs_input_grad[:2]))
        if dx is not None:
            rows = d.flatten(2).mT.reshape(len(x), -1, d.shape[1])
            seen = rows.new_zeros(*rows.shape[:2], spec.shape[1:].numel())
            ctx.product.add(seen, rows, back=True)
            dx = (dx + from_patches(seen.reshape(len(d), -1, seen.shape[-1]), x_rows.shape, spec)).reshape(x.shape)
        return dx, None if dW is None else dW.to(ctx.dtype), None, None


class PartwiseEmbedding(torch.autograd.Function):
    """Rows of every part's own table; the gradient goes to ``W`` as if they were rows of ``W``."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, rows: Tensor, index: Tensor, padding: int | None) -> Tensor:
        """Return ``rows``: ``(*index.shape, columns)``."""
        ctx.save_for_backward(index)
        ctx.height, ctx.padding = len(W), padding
        return own(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of ``W``."""
        (index,) = ctx.saved_tensors
        padding = -1 if ctx.padding is None else ctx.padding % ctx.height
        return torch.ops.aten.embedding_dense_backward(delta, index, ctx.height, padding, False), None, None, None
