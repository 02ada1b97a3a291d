"""Matrix products with a parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.tape import Look, Matrices, See, Site, Small
from steppe.factored.terms import Dense, Product


def low(t: Tensor) -> torch.dtype:
    """The type that a matrix product of ``t`` has here: autocast's where it is on."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


class HeldLinear(torch.autograd.Function):
    """``y_k = x_k P_k^T + b_k``: to ``x`` gradients go through ``P_k``, to ``W`` and ``b`` as if they were these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, P: Tensor, b_k: Tensor | None, W: Tensor, b: Tensor | None) -> Tensor:
        """``x``: ``(k, rows, columns)``; ``P``: ``(k, height, columns)``; ``b_k``: ``(k or 1, 1, height)``."""
        ctx.save_for_backward(x, P)
        ctx.dtype = W.dtype
        return x @ P.mT if b_k is None else torch.baddbmm(b_k, x, P.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``W`` and ``b``."""
        x, P = ctx.saved_tensors
        dx = delta @ P if ctx.needs_input_grad[0] else None
        return dx, None, None, *of_parameters(ctx, delta, x, ctx.needs_input_grad[3:])


class FactoredLinear(torch.autograd.Function):
    """``y_k = x_k (W + s_k G_k)^T + b_k``, ``G_k`` as factors: gradients go to ``W`` as if it were ``W + s_k G_k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, product: Product, b_eps: Tensor | None) -> Tensor:
        """``x``: ``(n, q, columns)``; ``b_eps``: ``(n, 1, height)``, unless it rides along in ``product``."""
        ctx.dtype, ctx.product, W = W.dtype, product, W.to(x.dtype)
        ctx.save_for_backward(x, W)
        y = F.linear(x, W, None if b is None else b.to(x.dtype))
        product.add(y, x)
        return y if b_eps is None else y.add_(b_eps)

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
        y = func(*args)
        kept = None if weight is None else x.detach().to(y.dtype)
        return look.record(y, Site(self, weight, bias, kept, tuple(y.shape[:-1])))

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
        see_with = self.with_held if see.matrix(site)[0].whole else self.with_factors
        return site.by_row(see_with(see, site, x_e, W, b), x.shape[:-1])

    def with_held(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """``x (W + eps_k)^T + b_k`` with ``W + eps_k`` in memory."""
        gradient, scale = see.matrix(site)
        P = gradient.perturbed(W.mT if self.transposed else W, scale, x.dtype)
        b_k = None if b is None else see.of_parts(b, site.bias)[:, None].to(x.dtype)
        biases = [b_k] * len(P) if b_k is None or len(b_k) == 1 else see.parts.split(b_k)
        made = [
            HeldLinear.apply(x_k, P_k.mT if self.transposed else P_k, c, W, b)  # type: ignore[no-untyped-call]
            for x_k, P_k, c in zip(see.parts.chunks(x), P, biases, strict=True)
        ]
        return see.parts.join(made, x.shape[1])

    def with_factors(self, see: See, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """``x (W + eps_k)^T + b_k`` with ``eps_k`` as factors."""
        gradient, scale = see.matrix(site)
        rides = site.bias not in see.small
        b_eps = None if rides else see.parts.spread(see.small[site.bias])[:, None].to(x.dtype)  # type: ignore[index]
        product = Product(gradient, scale, self.transposed)
        return FactoredLinear.apply(x, W, b, product, b_eps)  # type: ignore[no-any-return, no-untyped-call]
