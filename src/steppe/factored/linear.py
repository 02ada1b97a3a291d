"""Matrix products with a parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.tape import Look, Matrices, See, Site, Small
from steppe.factored.terms import Dense


def low(t: Tensor) -> torch.dtype:
    """The type that a matrix product of ``t`` has here: autocast's where it is on."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


class PartwiseLinear(torch.autograd.Function):
    """``y_k = x_k P_k^T``; the gradient goes to ``x`` through ``P`` and to ``W`` as if it were every ``P_k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, P: Tensor, W: Tensor) -> Tensor:
        """``x``: ``(parts, rows, columns)``; ``P``: ``(parts, height, columns)``."""
        ctx.save_for_backward(x, P)
        ctx.dtype = W.dtype
        return x @ P.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        """Gradients of ``x`` and ``W``."""
        x, P = ctx.saved_tensors
        dx = delta @ P if ctx.needs_input_grad[0] else None
        dW = (delta.flatten(0, 1).mT @ x.flatten(0, 1)).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return dx, None, dW


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
        """The terms of the weight and the sums of the bias."""
        delta = site.delta
        if site.weight is not None:
            a = site.by_example(site.kept)  # type: ignore[arg-type]
            matrices.setdefault(site.weight, []).append(Dense(a, delta) if self.transposed else Dense(delta, a))
        if site.bias is not None:
            small.setdefault(site.bias, []).append(delta.sum(1))

    def see(self, see: See, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Each micro-batch with its own weights."""
        args = (*args, *kwargs.values())
        x, W, b = self.read(args)
        weight, bias = see.tracked.index(W), see.tracked.index(b)
        if (weight is None and bias is None) or see.tracked.index(x) is not None or W.dim() != 2:
            return NotImplemented
        site = see.next(self, weight, bias)
        y = F.linear(x, self.turned(W)) if weight is None else self.perturbed(see, site, x, W)
        return see.plus(site, y, b).to(low(x))

    def turned(self, W: Tensor) -> Tensor:
        """The weight as ``(outputs, inputs)``."""
        return W.mT if self.transposed else W

    def perturbed(self, see: See, site: Site, x: Tensor, W: Tensor) -> Tensor:
        """``x (W + eps_k)^T``."""
        gradient, scale = see.matrices[site.weight]  # type: ignore[index]
        x_e = site.by_example(x.to(low(x)))
        chunks = see.parts.chunks(x_e)
        scales = see.parts.split(scale[:, None, None])
        if gradient.whole:
            P = gradient.perturbed(W, scale, x_e.dtype)
            rows = zip(chunks, P, strict=True)
            made = [PartwiseLinear.apply(x_k, self.turned(P_k), self.turned(W)) for x_k, P_k in rows]  # type: ignore[no-untyped-call]
            return site.by_row(see.parts.join(made, x_e.shape[1]), x.shape[:-1])
        extra = gradient.apply(
            lambda t: t.transposed_times(chunks, see.parts) if self.transposed else t.times(chunks, see.parts)
        )
        extra = [(s * e).to(e.dtype) for s, e in zip(scales, extra, strict=True)]
        plain = x.to(low(x)) @ W.to(low(x)) if self.transposed else F.linear(x, W)
        return plain + site.by_row(see.parts.join(extra, x_e.shape[1]), x.shape[:-1])
