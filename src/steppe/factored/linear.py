"""Matrix products with a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.held import Held
from steppe.factored.parts import Parts
from steppe.factored.tape import Look, Matrices, See, Site, Small
from steppe.factored.terms import Dense, Product


def low(t: Tensor) -> torch.dtype:
    """The type that a matrix product of ``t`` has here: autocast's where it is on."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


def own(y: Tensor) -> Tensor:
    """The same memory as no view, for the model to change in place: of a view that a function returns it may not."""
    return y.new_empty(0).set_(y)  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Blocks:
    """``P_k = W + s_k G_k`` block by block; ``turned`` where ``G_k`` is a gradient of ``W^T``."""

    gradient: Held
    scale: Tensor
    W: Tensor
    dtype: torch.dtype
    turned: bool = False

    @property
    def parts(self) -> Parts:
        """The micro-batches."""
        return self.gradient.parts

    def __call__(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Chunk, parts of the chunk and their weights, ``(parts, height, columns)``."""
        for c, at, P in self.gradient.perturbed(self.W.mT if self.turned else self.W, self.scale, self.dtype):
            yield c, at, P.mT if self.turned else P


class HeldLinear(torch.autograd.Function):
    """``y_k = x_k P_k^T + b_k``: to ``x`` gradients go through ``P_k``, to ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, weights: Blocks, b_k: Sequence[Any]) -> Tensor:
        """``x``: ``(n, q, columns)``; ``b_k``: by chunk, ``(k, 1, height)`` or nothing."""
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
        """Gradients of ``x``, ``W`` and ``b``."""
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
        """``x``: ``(n, q, columns)``; ``b_eps``: ``(n, 1, height)``, unless it rides along in ``product``."""
        ctx.dtype, ctx.product, W = W.dtype, product, W.to(x.dtype)
        ctx.save_for_backward(x, W)
        y = F.linear(x, W, None if b is None else b.to(x.dtype))
        product.add(y, x)
        return own(y if b_eps is None else y.add_(b_eps))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``W`` and ``b``."""
        x, W = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = delta @ W
            ctx.product.add(dx, delta, back=True)
        return dx, *of_parameters(ctx, delta, x, ctx.needs_input_grad[1:3]), None, None


def of_parameters(ctx: Any, delta: Tensor, x: Tensor, needed: Any) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``W`` and ``b`` by the usual products over the whole batch."""
    dW = (delta.flatten(0, 1).mT @ x.flatten(0, 1)).to(ctx.dtype) if needed[0] else None
    return dW, delta.sum((0, 1), dtype=ctx.dtype) if needed[1] else None


class Linear:
    """``y = x W^T + b``; with ``transposed``, ``y = x W + b``."""

    def __init__(self, transposed: bool = False, arguments: tuple[int, int, int] = (0, 1, 2)) -> None:
        self.transposed, self.arguments = transposed, arguments

    def read(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias."""
        x, W, b = (args[i] if i < len(args) else None for i in self.arguments)
        return x, W, b  # type: ignore[return-value]

    def look(self, look: Look, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep the input."""
        args = (*args, *kwargs.values())
        x, W, b = self.read(args)
        weight, bias = look.tracked.index(W), look.tracked.index(b)
        if (weight is None and bias is None) or look.tracked.index(x) is not None or W.dim() != 2:
            return NotImplemented
        rows = x.flatten(0, -2) if x.dim() > 2 else x
        y = func(*(rows if a is x else a for a in args))
        shape = torch.Size((*x.shape[:-1], y.shape[-1]))
        kept = None if weight is None else x.detach().to(y.dtype)
        return look.record(y, Site(self, weight, bias, kept, tuple(shape[:-1])), shape).reshape(shape)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """The terms of the weight, with which the bias may ride, or the sums of the bias."""
        delta = site.delta
        if site.weight is not None:
            a = site.by_example(site.kept)  # type: ignore[arg-type]
            term = Dense(a, delta) if self.transposed else Dense(delta, a, site.bias)
            matrices.setdefault(site.weight, []).append(term)
        if site.bias is not None and (site.weight is None or self.transposed):
            small.setdefault(site.bias, []).append(delta.sum(1))

    def see(self, see: See, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Each micro-batch with its own weights."""
        args = (*args, *kwargs.values())
        x, W, b = self.read(args)
        weight, bias = see.tracked.index(W), see.tracked.index(b)
        if (weight is None and bias is None) or see.tracked.index(x) is not None or W.dim() != 2:
            return NotImplemented
        site = see.next(self, weight, bias)
        W = W.mT if self.transposed else W
        x = x.to(low(x))
        if weight is None:
            return see.plus(site, F.linear(x, W), b).to(x.dtype)
        x_e = site.by_example(x)
        see_with = self.with_held if isinstance(see.matrices[weight][0], Held) else self.with_factors
        return site.by_row(see_with(see, site, x_e, W, b), x.shape[:-1])

    def with_held(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """``x (W + eps_k)^T + b_k`` with ``W + eps_k`` in memory."""
        weights = Blocks(*see.matrices[site.weight], W, x.dtype, self.transposed)  # type: ignore[arg-type, index]
        b_k: Sequence[Any] = [None] * len(see.parts.spans)
        if b is not None:
            b_k = see.parts.split(see.of_parts(b, site.bias)[:, None].to(x.dtype))
        return HeldLinear.apply(x, W, b, weights, b_k)  # type: ignore[no-any-return, no-untyped-call]

    def with_factors(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """``x (W + eps_k)^T + b_k`` with ``eps_k`` as factors."""
        rides = site.bias not in see.small
        b_eps = None if rides else see.parts.spread(see.small[site.bias])[:, None].to(x.dtype)  # type: ignore[index]
        product = Product(*see.matrices[site.weight], self.transposed)  # type: ignore[arg-type, index]
        return FactoredLinear.apply(x, W, b, product, b_eps)  # type: ignore[no-any-return, no-untyped-call]
