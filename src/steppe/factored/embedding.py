"""Rows of a parameter by index."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small
from steppe.factored.terms import Lookup


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
        gradient, scale = see.matrices[weight]
        index_e = site.by_example(index)
        chunks = see.parts.chunks(index_e)
        if gradient.whole:
            P = gradient.perturbed(W, scale, W.dtype)
            looked = [p.gather(1, i[..., None].expand(-1, -1, W.shape[1])) for p, i in zip(P, chunks, strict=True)]
            rows = site.by_row(see.parts.join(looked, index_e.shape[1]), index.shape) - F.embedding(index, W.detach())
        else:
            extra = gradient.apply(lambda t: t.rows(chunks, see.parts))
            extra = [s * e for s, e in zip(see.parts.split(scale[:, None, None]), extra, strict=True)]
            rows = site.by_row(see.parts.join(extra, index_e.shape[1]), index.shape)
        return F.embedding(index, W, padding) + rows.to(W.dtype)
