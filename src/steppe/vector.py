"""A list of tensors with the algebra of one long vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Scalar = float | Tensor  # a Python number, or a 0-dim tensor that stays on its device

TINY = 1e-12  # added to a norm before dividing by it


LOW = {torch.bfloat16, torch.float16}


def wide(t: Tensor) -> Tensor:
    """``t`` in at least float32: sums over bfloat16 or float16 lose what they are meant to measure."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def shift_(w: Tensor, t: Tensor, c: Scalar, finite: Tensor | None = None) -> None:
    """``w <- w + c t`` in place, computed in at least float32 and rounded to ``w``'s type once.

    Where ``finite`` is a number that is not, ``w`` stays: decided on its device. (On a CPU the caller has looked.)
    """
    if finite is not None and finite.device.type != "cpu":
        t, c = torch.nan_to_num(t, 0.0, 0.0, 0.0), torch.where(finite.isfinite(), c, 0.0)
    if wide(w) is not w:
        w.copy_(_plus(w, t, c))
    elif isinstance(c, Tensor):
        w.addcmul_(wide(t), c.to(w.device))
    else:
        w.add_(wide(t), alpha=c)


def copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy in place; in one call, so that no interrupt comes half way, except for sharded tensors, which have none."""
    if any(hasattr(t, "full_tensor") for t in targets):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
    else:
        torch._foreach_copy_(targets, sources)


@dataclass(frozen=True, eq=False)
class Vector:
    """``scale * tensors``, one entry a parameter; ``None`` is a parameter that takes no part and counts as zero.

    Scaling only changes ``scale``, so ``rho * g / norm(g)`` costs no memory until weights are moved by it. Sums and
    elementwise functions make new tensors, in at least float32. Tensors are never changed: a vector is a value.
    """

    tensors: Sequence[Tensor | None]
    scale: Scalar = 1.0
    _memo: dict[str, Tensor] = field(default_factory=dict, repr=False)  # norm of `tensors`, shared by multiples

    def norm(self) -> Tensor:
        """Euclidean norm over all entries together, a 0-dim tensor in at least float32, whole on every rank."""
        if "norm" not in self._memo:
            self._memo["norm"] = _norm(self.present())
        n = self._memo["norm"]
        return (
            n if _is_one(self.scale) else n * (self.scale.abs() if isinstance(self.scale, Tensor) else abs(self.scale))
        )

    def dot(self, other: Vector) -> Tensor:
        """Inner product over all entries together, a 0-dim tensor in at least float32, whole on every rank."""
        pairs = [(a, b) for a, b in zip(self.tensors, other.tensors, strict=True) if a is not None and b is not None]
        if not pairs:
            return torch.zeros(())
        total = _dot(*pairs[0])
        for a, b in pairs[1:]:
            total = total + _dot(a, b).to(total.device)
        return total * self.scale * other.scale

    def present(self) -> list[Tensor]:
        """The entries that are not ``None``, unscaled."""
        return [t for t in self.tensors if t is not None]

    def materialised(self) -> list[Tensor | None]:
        """The entries with ``scale`` multiplied in; the very tensors where ``scale`` is 1."""
        return [None if t is None else _times(t, self.scale) for t in self.tensors]

    def map(self, f: Callable[..., Tensor], *others: Vector) -> Vector:
        """``f`` of the entries of this vector and the others', where none of them is ``None``."""
        rows = zip(self.materialised(), *(o.materialised() for o in others), strict=True)
        return Vector([None if any(t is None for t in row) else f(*map(wide, row)) for row in rows])

    def where(self, keep: Iterable[object]) -> Vector:
        """This vector on the entries where ``keep`` is true, ``None`` elsewhere."""
        kept = [t if k else None for t, k in zip(self.tensors, keep, strict=True)]
        return self if all(a is b for a, b in zip(kept, self.tensors, strict=True)) else Vector(kept, self.scale)

    def each(self, factors: Sequence[float]) -> Vector:
        """Every entry times its own factor."""
        scaled = zip(self.materialised(), factors, strict=True)
        return Vector([None if t is None else _times(t, c) for t, c in scaled])

    def __mul__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):  # elementwise; a None on either side is zero
            return self.map(torch.mul, other)
        return Vector(self.tensors, other if _is_one(self.scale) else self.scale * other, self._memo)

    __rmul__ = __mul__

    def __truediv__(self, c: Scalar) -> Vector:
        return self * (1.0 / c)

    def __add__(self, other: Vector) -> Vector:
        pairs = zip(self.tensors, other.tensors, strict=True)
        return Vector([_sum(a, self.scale, b, other.scale) for a, b in pairs])

    def __sub__(self, other: Vector) -> Vector:
        return self + other * -1.0


def _is_one(c: Scalar) -> bool:
    return not isinstance(c, Tensor) and c == 1.0


def _times(t: Tensor, c: Scalar) -> Tensor:
    return t if _is_one(c) else wide(t) * (c.to(t.device) if isinstance(c, Tensor) else c)


def _plus(x: Tensor, y: Tensor, c: Scalar) -> Tensor:
    """``x + c y``."""
    if isinstance(c, Tensor):
        return torch.addcmul(wide(x), wide(y), c.to(x.device))
    return torch.add(wide(x), wide(y), alpha=c)


def _sum(x: Tensor | None, cx: Scalar, y: Tensor | None, cy: Scalar) -> Tensor | None:
    if x is None:
        return None if y is None else _times(y, cy)
    if y is None:
        return _times(x, cx)
    return _plus(y, x, cx) if _is_one(cy) else _plus(_times(x, cx), y, cy)


def _whole(t: Tensor) -> Tensor:
    """A sharded tensor's reduction as one plain tensor, the same on every rank."""
    full: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return full


def _norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    types = {t.dtype for t in tensors}
    norms = torch._foreach_norm(tensors, 2, **({"dtype": _sum_type(types)} if len(types) > 1 or types & LOW else {}))
    first = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([_whole(n).to(first) for n in norms]))
    return total


def _sum_type(types: set[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in types else torch.float32


def _dot(a: Tensor, b: Tensor) -> Tensor:
    a, b = wide(a), wide(b)
    if type(a) is Tensor is type(b) and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))  # no temporary
    return _whole((a * b).sum())
