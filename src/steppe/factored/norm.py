"""Normalisation with a learned scale and shift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small


def affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """``x w + b``."""
    if w is None:
        return x if b is None else x + b
    return x * w if b is None else torch.addcmul(b.to(x.dtype), x, w.to(x.dtype))


class Norm:
    """``y = normalised(x) w + b``.

    Args:
        arguments: where weight and bias stand among the arguments of ``func``.
        channels_first: channels are dimension 1 (instance, batch normalisation), not the last ones.
    """

    def __init__(self, arguments: tuple[int, int | None], names: tuple[str, str], channels_first: bool) -> None:
        self.arguments, self.names, self.channels_first = arguments, names, channels_first

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], list[Any]]:
        """The arguments without scale and shift, and these two."""
        kept, rest, taken = list(args), dict(kwargs), []
        for position, name in zip(self.arguments, self.names, strict=True):
            value = rest.pop(name, None)
            if position is not None and position < len(kept):
                value, kept[position] = kept[position], None
            taken.append(value)
        return kept, rest, taken

    def look(self, look: Look, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Normalise without, keep that, then scale and shift."""
        rest, options, (w, b) = self.take(args, kwargs)
        weight, bias = look.tracked.index(w), look.tracked.index(b)
        if weight is None and bias is None:
            return NotImplemented
        x = func(*rest, **options)
        leading = x.shape[:1] if self.channels_first else x.shape[: x.dim() - (w if w is not None else b).dim()]
        y = affine(x, None if w is None else self.shaped(w, x), None if b is None else self.shaped(b, x))
        site = Site(self, weight, bias, None if weight is None else x.detach(), tuple(leading))
        return look.record(y.to(x.dtype), site)

    def shaped(self, p: Tensor, x: Tensor) -> Tensor:
        """A parameter with the dimensions that follow the leading ones."""
        return p.reshape(*p.shape, *[1] * (x.dim() - 2)) if self.channels_first else p

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """``delta * x`` and ``delta``, summed over what an example shares."""
        if site.weight is not None and site.kept is not None:
            small.setdefault(site.weight, []).append(self.summed(site, site.deltas[0] * site.kept))
        if site.bias is not None:
            small.setdefault(site.bias, []).append(self.summed(site, site.deltas[0]))

    def summed(self, site: Site, t: Tensor) -> Tensor:
        """``(n, *shape of the parameter)``."""
        if self.channels_first and t.dim() > 2:
            t = t.flatten(2).sum(2)
        return site.by_example(t).sum(1)

    def see(self, see: See, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Scale and shift every micro-batch with its own."""
        rest, options, (w, b) = self.take(args, kwargs)
        weight, bias = see.tracked.index(w), see.tracked.index(b)
        if weight is None and bias is None:
            return NotImplemented
        site = see.next(self, weight, bias)
        x = func(*rest, **options)
        leading = x.shape[: len(site.leading)]
        scale = None if w is None else self.spread(see, site, w, weight, x, leading)
        return affine(x, scale, None if b is None else self.spread(see, site, b, bias, x, leading)).to(x.dtype)

    def spread(self, see: See, site: Site, p: Tensor, index: int | None, x: Tensor, leading: Any) -> Tensor:
        """``p + eps_k`` of every row, with the dimensions of ``x``."""
        if index is None:
            return self.shaped(p, x)
        rows = see.rows_of(site, p, index, leading)
        return rows.reshape(*rows.shape, *[1] * (x.dim() - 2)) if self.channels_first else rows


class GroupNorm:
    """Group normalisation in one call: examples' groups side by side, with scale and shift of each example's own."""

    def look(self, look: Look, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Repeat scale and shift for every example, and watch the copies."""
        x, groups, parameters, eps = self.read(*args, **kwargs)
        index = [look.tracked.index(p) for p in parameters]
        if not any(i is not None for i in index):
            return NotImplemented
        rows = []
        for p, i in zip(parameters, index, strict=True):
            repeated = p.expand(len(x), -1)
            rows.append(repeated if i is None else look.record(repeated, Site(self, i, None, None, (len(x),))))
        return self.run(x, groups, rows, eps)

    @staticmethod
    def read(
        x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> tuple[Tensor, int, list[Tensor], float]:
        """The arguments of ``torch.nn.functional.group_norm``."""
        if weight is None and bias is not None:
            raise CannotFactor("group normalisation with a shift and no scale has no factored form")
        return x, num_groups, [p for p in (weight, bias) if p is not None], eps

    @staticmethod
    def run(x: Tensor, groups: int, rows: list[Tensor], eps: float) -> Tensor:
        """``n`` examples as one with ``n`` times the channels and groups."""
        n = len(x)
        scale, shift = (*(row.reshape(-1) for row in rows), None)[:2]
        return F.group_norm(x.reshape(1, -1, *x.shape[2:]), n * groups, scale, shift, eps).reshape(x.shape)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """The gradients of each example's copy."""
        assert site.weight is not None
        small.setdefault(site.weight, []).append(site.delta.sum(1))

    def see(self, see: See, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Every micro-batch with its own scale and shift."""
        x, groups, parameters, eps = self.read(*args, **kwargs)
        index = [see.tracked.index(p) for p in parameters]
        if not any(i is not None for i in index):
            return NotImplemented
        rows = []
        for p, i in zip(parameters, index, strict=True):
            if i is None:
                rows.append(p.expand(len(x), -1))
            else:
                rows.append(see.rows_of(see.next(self, i, None), p, i, x.shape[:1]))
        return self.run(x, groups, rows, eps)
