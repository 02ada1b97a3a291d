"""Layers whose parameters act element by element: scales and shifts of normalisation, positions, class tokens.

These parameters are small, so every example gets a copy, and the gradient of the copy is the per-example gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import Matrices, Site, Small, Tracked


def affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """Return ``x w + b``."""
    if w is None:
        return x if b is None else x + b
    return x * w if b is None else torch.addcmul(b.to(x.dtype), x, w.to(x.dtype))


class NormLayer:
    """Layer, RMS, instance and batch normalisation: ``y = normalised(x) w + b``.

    Args:
        arguments: the positions of weight and bias among the arguments of the function.
        channels_first: whether channels are dimension 1 (instance, batch normalisation), not the last dimensions.
        units: whether the function is faster with ones and zeros for scale and shift than without them, as torch's
            layer normalisation is on a CPU: 1 % of a step of a transformer.
    """

    def __init__(self, arguments: tuple[int, int | None], channels_first: bool, units: bool = False) -> None:
        self.arguments, self.channels_first, self.units = arguments, channels_first, units

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], list[Any]]:
        """Return the arguments without scale and shift, and these two."""
        kept, rest, taken = list(args), dict(kwargs), []
        for position, name, unit in zip(self.arguments, ("weight", "bias"), (1.0, 0.0), strict=True):
            value = rest.pop(name, None)
            if position is not None and position < len(kept):
                value, kept[position] = kept[position], None
            if value is not None and self.units:
                rest[name] = torch.full_like(value, unit)
            taken.append(value)
        return kept, rest, taken

    def record(self, first: FirstPass, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Normalise without scale and shift, keep the result, then apply them."""
        rest, options, (w, b) = self.take(args, kwargs)
        weight, bias = first.tracked.index(w), first.tracked.index(b)
        if weight is None and bias is None:
            return NotImplemented
        x = func(*rest, **options)
        leading = x.shape[:1] if self.channels_first else x.shape[: x.dim() - (w if w is not None else b).dim()]
        y = affine(x, None if w is None else self.shaped(w, x), None if b is None else self.shaped(b, x))
        site = Site(self, weight, bias, None if weight is None else x.detach(), tuple(leading))
        return first.watch(y.to(x.dtype), site)

    def shaped(self, p: Tensor, x: Tensor) -> Tensor:
        """Return a parameter, or rows of it, with the dimensions of ``x`` that follow the channels."""
        return p.reshape(*p.shape, *[1] * (x.dim() - 2)) if self.channels_first else p

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the per-example gradients of scale, ``delta * x``, and shift, ``delta``."""
        if site.weight is not None and site.kept is not None:
            small.setdefault(site.weight, []).append(self.summed(site, site.deltas[0] * site.kept))
        if site.bias is not None:
            small.setdefault(site.bias, []).append(self.summed(site, site.deltas[0]))

    def summed(self, site: Site, t: Tensor) -> Tensor:
        """Return the sums over the rows of each example, ``(n, *shape of the parameter)``."""
        if self.channels_first and t.dim() > 2:
            t = t.flatten(2).sum(2)
        return site.sums(t)

    def evaluate(self, second: SecondPass, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Normalise, and apply the scale and shift of each micro-batch."""
        rest, options, (w, b) = self.take(args, kwargs)
        weight, bias = second.tracked.index(w), second.tracked.index(b)
        if weight is None and bias is None:
            return NotImplemented
        site = second.next(self, weight, bias)
        x = func(*rest, **options)
        leading = x.shape[: len(site.leading)]

        def rows(p: Tensor | None, index: int | None) -> Tensor | None:
            if p is None:
                return None
            return self.shaped(p if index is None else second.rows_of(site, p, index, leading), x)

        return affine(x, rows(w, weight), rows(b, bias)).to(x.dtype)


class GroupNormLayer:
    """Group normalisation of all examples in one call, the groups of the examples side by side."""

    def run(self, passing: FirstPass | SecondPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalise with a copy of scale and shift for every example."""
        x, groups, both, eps = self.read(*args, **kwargs)
        index = [passing.tracked.index(p) for p in both]
        if index == [None, None]:
            return NotImplemented
        n, channels, *size = x.shape
        scale, shift = passing.scale_and_shift(self, both, index, n, None).unbind(1)
        y = F.group_norm(x.reshape(1, n * channels, *size), n * groups, scale.flatten(), shift.flatten(), eps)
        return y.reshape(x.shape)

    record = evaluate = run

    @staticmethod
    def read(
        x: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> tuple[Tensor, int, list[Tensor], float]:
        """Return the arguments of ``torch.nn.functional.group_norm``."""
        return x, num_groups, scale_and_shift(x, weight, bias), eps

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the gradients of the copies."""
        collect_both(site, site.sums(site.deltas[0]), small)


def scale_and_shift(x: Tensor, w: Tensor | None, b: Tensor | None) -> list[Tensor]:
    """Return both, or ones and zeros for each channel."""
    return [x.new_ones(x.shape[1]) if w is None else w, x.new_zeros(x.shape[1]) if b is None else b]


def collect_both(site: Site, gradients: Tensor, small: Small) -> None:
    """Add the gradients of scale and shift, ``(n or k, 2, C)``."""
    for i, t in zip((site.weight, site.bias), gradients.unbind(1), strict=True):
        if i is not None:
            small.setdefault(i, []).append(t)


class Elementwise:
    """An elementwise operation with a parameter, or an expansion of one.

    The parameter has no example dimension, or one of size 1. The other operand, or the expansion, has examples first.

    Args:
        in_place: whether the other operand is changed in place.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place

    def find(self, tracked: Tracked, args: tuple[Any, ...]) -> tuple[int, int] | None:
        """Return the position of the parameter and its index; ``None`` if it cannot be copied for every example."""
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

    def run(self, passing: FirstPass | SecondPass, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Apply the operation to a copy of the parameter for every example."""
        found = self.find(passing.tracked, args)
        if found is None:
            return NotImplemented
        at, index = found
        p, other = args[at], args[1 - at]
        dims = other.dim() if isinstance(other, Tensor) else p.dim()
        shape = p.shape[1:] if p.dim() == dims else (*[1] * (dims - 1 - p.dim()), *p.shape)
        copies = passing.copies(self, p.reshape(shape), index, passing.tracked.n)
        return func(*args[:at], copies, *args[at + 1 :], **kwargs)

    record = evaluate = run

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the gradients of the copies."""
        small.setdefault(site.weight, []).append(site.sums(site.deltas[0]))  # type: ignore[arg-type]
