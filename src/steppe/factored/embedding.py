"""Rows of a parameter by index."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from steppe.factored.held import Held
from steppe.factored.linear import own
from steppe.factored.lookups import Lookup
from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small
from steppe.factored.terms import Gradient


class PartwiseEmbedding(torch.autograd.Function):
    """Rows of every part's own table; the gradient goes to ``W`` as if they were rows of ``W``."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, rows: Tensor, index: Tensor, padding: int | None) -> Tensor:
        """``rows``: ``(*index.shape, columns)``."""
        ctx.save_for_backward(index)
        ctx.height, ctx.padding = len(W), padding
        return own(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of ``W``."""
        (index,) = ctx.saved_tensors
        padding = -1 if ctx.padding is None else ctx.padding % ctx.height
        return torch.ops.aten.embedding_dense_backward(delta, index, ctx.height, padding, False), None, None, None


class Embedding:
    """``y = W[index]``."""

    def look(
        self,
        look: Look,
        func: Any,
        index: Tensor,
        W: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        """Keep the index; rows that belong to no example are repeated for each, to have its own gradient."""
        weight = look.tracked.index(W)
        if weight is None:
            return NotImplemented
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise CannotFactor(f"{look.tracked.names[weight]} uses an option of embedding that has no factored form")
        free = look.is_free()
        index = self.repeated(index, look.tracked.n) if free else index
        y = F.embedding(index, W, padding_idx)
        return look.record(y, Site(self, weight, None, index, tuple(index.shape), (padding_idx, free, len(W))))

    @staticmethod
    def repeated(index: Tensor, n: int) -> Tensor:
        """The index once for every example, along a first dimension."""
        return (index if index.dim() > 1 and index.shape[0] == 1 else index[None]).expand(n, *index.shape[-1:])

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """A lookup term; padding has no gradient."""
        index, delta = site.by_example(site.kept), site.delta  # type: ignore[arg-type]
        padding, _, height = site.static
        if padding is not None:
            delta = delta * (index != padding)[..., None]
        matrices.setdefault(site.weight, []).append(Lookup(index, delta, height))  # type: ignore[arg-type]

    def see(self, see: See, func: Any, index: Tensor, W: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``W[index] + eps_k[index]``."""
        weight = see.tracked.index(W)
        if weight is None:
            return NotImplemented
        site = see.next(self, weight, None)
        padding, free, _ = site.static
        index = self.repeated(index, see.tracked.n) if free else index
        rows = site.by_row(self.rows(see, site.by_example(index), W.detach(), *see.matrices[weight]), index.shape)
        return PartwiseEmbedding.apply(W, rows, index, padding)  # type: ignore[no-untyped-call]

    @staticmethod
    def rows(see: See, index: Tensor, W: Tensor, gradient: Gradient, scale: Tensor) -> Tensor:
        """``W[index] + eps_k[index]`` for indices of ``(n, q)``."""
        if isinstance(gradient, Held):
            chunks, width = see.parts.chunks(index), W.shape[1]
            blocks = gradient.perturbed(W, scale, W.dtype)
            looked = [P.gather(1, chunks[c][at][..., None].expand(-1, -1, width)) for c, at, P in blocks]
            return see.parts.join(looked, index.shape[1])
        eps = see.parts.spread(scale)[:, None, None].to(W.dtype) * gradient.rows(index)
        return W[index] + eps
