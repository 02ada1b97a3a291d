"""Parameters used directly: positions, class tokens, scales and shifts of a module of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steppe.factored.tape import Look, Matrices, See, Site, Small, Tracked


class Plain:
    """An elementwise operation with, or an expansion of, a parameter: each example gets a copy of its own.

    The parameter has no example dimension, or one of size 1; the other operand, or the expansion, has the examples
    first. ``in_place`` it is the other operand that is changed.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place

    def find(self, tracked: Tracked, args: tuple[Any, ...]) -> tuple[int, int] | None:
        """Which argument is the parameter, and which parameter; ``None`` if it cannot be repeated."""
        if len(args) < 2:
            return None
        index = [tracked.index(a) for a in args[:2]]
        at = 0 if index[0] is not None else 1
        if index[at] is None or index[1 - at] is not None or (self.in_place and at == 0):
            return None
        p, other = args[at], args[1 - at]
        if not isinstance(other, Tensor):  # expand(n, ...): sizes
            sizes = other if isinstance(other, tuple | list | torch.Size) else args[1:]
            fits = at == 0 and p.dim() == len(sizes) and p.shape[0] == 1 and sizes[0] == tracked.n
        else:
            fits = other.dim() > 0 and other.shape[0] == tracked.n
            fits &= p.dim() < other.dim() or (p.dim() == other.dim() and p.shape[0] == 1)
        return (at, index[at]) if fits else None  # type: ignore[return-value]

    def repeated(self, p: Tensor, args: tuple[Any, ...], at: int, n: int) -> Tensor:
        """``p`` for every example, with the other operand's dimensions."""
        other = args[1 - at]
        dims = other.dim() if isinstance(other, Tensor) else p.dim()
        shape = p.shape[1:] if p.dim() == dims else (*[1] * (dims - 1 - p.dim()), *p.shape)
        return p.reshape(1, *shape).expand(n, *shape)

    def look(self, look: Look, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The operation on repeated parameters, whose gradients are watched."""
        found = self.find(look.tracked, args)
        if found is None:
            return NotImplemented
        at, index = found
        p = self.repeated(args[at], args, at, look.tracked.n)
        p = look.record(p.clone(), Site(self, index, None, None, (look.tracked.n,)))
        return func(*args[:at], p, *args[at + 1 :], **kwargs)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """The gradient of each example's copy."""
        assert site.weight is not None
        small.setdefault(site.weight, []).append(site.deltas[0])

    def see(self, see: See, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The operation on each micro-batch's own parameter."""
        found = self.find(see.tracked, args)
        if found is None:
            return NotImplemented
        at, index = found
        see.next(self, index, None)
        p = self.repeated(args[at], args, at, see.tracked.n)
        eps = see.parts.spread(see.small[index]).to(p.dtype)
        return func(*args[:at], p + eps.reshape(p.shape), *args[at + 1 :], **kwargs)
