"""A list of tensors with the algebra of one long vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

Scalar = float | Tensor  # a Python number, or a 0-dim tensor that stays on its device

TINY = 1e-12  # added to a norm before dividing by it

LOW = {torch.bfloat16, torch.float16}
PLAIN = {Tensor, nn.Parameter}
MANY, SMALL = 256, 1024  # tensors, and numbers in one
KIND = attrgetter("dtype", "device")  # what all tensors of one call must share


def wide(t: Tensor) -> Tensor:
    """Return ``t`` in at least float32: sums in bfloat16 or float16 lose small terms."""
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def is_sharded(t: Tensor) -> bool:
    """Tell whether a tensor is spread over ranks (a ``DTensor``)."""
    return type(t) not in PLAIN and hasattr(t, "full_tensor")


def shard_like(t: Tensor, like: Tensor) -> Tensor:
    """Shard a plain tensor, equal on all ranks, as ``like`` is; return it where ``like`` is plain."""
    if not is_sharded(like):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local(t: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, which shares its memory; any other tensor itself."""
    part: Tensor = t.detach().to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
    return part


def shift_(w: Tensor, t: Tensor, c: Scalar, finite: Tensor | None = None) -> None:
    """Set ``w <- w + c t`` in place, computed in at least float32 and rounded to ``w``'s type once.

    Where ``finite`` is a number that is not, ``w`` stays: decided on its device.
    """
    if finite is not None:
        t = torch.nan_to_num(t, 0.0, 0.0, 0.0)
        c = c.to(finite) if isinstance(c, Tensor) else torch.full_like(finite, c)
        c = torch.where(finite.isfinite(), c, 0.0)
    if wide(w) is not w:
        w.copy_(_plus(w, t, c))
    elif isinstance(c, Tensor):
        w.addcmul_(wide(t), c.to(w.device))
    else:
        w.add_(wide(t), alpha=c)


def shift_all_(ws: list[Tensor], ts: list[Tensor], c: Scalar, finite: Tensor | None = None) -> None:
    """Set every ``w <- w + c t`` in place as :func:`shift_` does, in one call where types and devices are the same."""
    types = set(map(KIND, (*ws, *ts)))
    if finite is None and len(types) == 1 and ws[0].dtype not in LOW:
        if isinstance(c, Tensor):
            torch._foreach_addcmul_(ws, ts, [c.to(ws[0].device)] * len(ws))
        else:
            torch._foreach_add_(ws, ts, alpha=c)
        return
    for w, t in zip(ws, ts, strict=True):
        shift_(w, t, c, finite)


def lerp_(m: Tensor, t: Tensor, c: float) -> None:
    """Set ``m <- m + c (t - m)`` in place, computed in at least float32 and rounded to ``m``'s type once."""
    if m.dtype == t.dtype == wide(m).dtype:
        m.lerp_(t, c)
    else:
        m.copy_(_lerp(m, t, c))


@dataclass(frozen=True, eq=False)
class Vector:
    """``scale * tensors``, one entry a parameter; ``None`` is a parameter that takes no part and counts as zero.

    Scaling only changes ``scale``, so ``rho * g / norm(g)`` costs no memory until weights are moved by it. Sums and
    elementwise functions make new tensors, in at least float32. Tensors are never changed: a vector is a value.
    """

    tensors: Sequence[Tensor | None]
    scale: Scalar = 1.0
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)  # norm and products of `tensors`, of all multiples

    def norm(self) -> Tensor:
        """Return the Euclidean norm over all entries, a 0-dim tensor in at least float32, whole on every rank."""
        if "norm" not in self._memo:
            self._memo["norm"] = _norm(self.present())
        n: Tensor = self._memo["norm"]
        return (
            n if _is_one(self.scale) else n * (self.scale.abs() if isinstance(self.scale, Tensor) else abs(self.scale))
        )

    def dot(self, other: Vector) -> Tensor:
        """Return the inner product over all entries, a 0-dim tensor in at least float32, whole on every rank."""
        known = self._memo.get(id(other._memo))
        if known is None:
            known = self._memo[id(other._memo)] = self._dot(other), other._memo  # keep it, so that the id is not reused
        return known[0] * self.scale * other.scale

    def _dot(self, other: Vector) -> Tensor:
        pairs = [(a, b) for a, b in zip(self.tensors, other.tensors, strict=True) if a is not None and b is not None]
        if not pairs:
            return torch.zeros(())
        products = [_dot(local(a), local(b)) for a, b in pairs]
        return _sum_over_shards(products, [a for a, _ in pairs])

    def present(self) -> list[Tensor]:
        """Return the entries that are not ``None``, unscaled."""
        return [t for t in self.tensors if t is not None]

    def materialised(self) -> list[Tensor | None]:
        """Return the entries times ``scale``; the tensors themselves where ``scale`` is 1."""
        if _is_one(self.scale):
            return list(self.tensors)
        return [None if t is None else _times(t, self.scale) for t in self.tensors]

    def map(self, f: Callable[..., Tensor], *others: Vector) -> Vector:
        """Return ``f`` of the entries of this vector and the others', where none of them is ``None``."""
        rows = zip(self.materialised(), *(o.materialised() for o in others), strict=True)
        return Vector([None if any(t is None for t in row) else f(*map(wide, row)) for row in rows])

    def where(self, keep: Iterable[object]) -> Vector:
        """Return this vector on the entries where ``keep`` is true, ``None`` elsewhere."""
        keep = list(keep)
        if all(keep):
            return self
        kept = [t if k else None for t, k in zip(self.tensors, keep, strict=True)]
        return self if all(a is b for a, b in zip(kept, self.tensors, strict=True)) else Vector(kept, self.scale)

    def each(self, factors: Sequence[float]) -> Vector:
        """Return every entry times its own factor."""
        scaled = zip(self.materialised(), factors, strict=True)
        return Vector([None if t is None else _times(t, c) for t, c in scaled])

    def lerp(self, other: Vector, c: float) -> Vector:
        """Return ``self + c (other - self)``, in one pass over the memory."""
        xs, ys = self.materialised(), other.materialised()
        if alike(xs, ys):
            return Vector(torch._foreach_lerp(xs, ys, c))  # type: ignore[arg-type]
        pairs = zip(xs, ys, strict=True)
        return Vector([_sum(x, 1 - c, y, c) if x is None or y is None else _lerp(x, y, c) for x, y in pairs])

    def __mul__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):  # elementwise; a None on either side is zero
            return self.map(torch.mul, other)
        return Vector(self.tensors, other if _is_one(self.scale) else self.scale * other, self._memo)

    __rmul__ = __mul__

    def __truediv__(self, c: Scalar) -> Vector:
        return self * (1.0 / c)

    def __add__(self, other: Vector) -> Vector:
        c, d = self.scale, other.scale
        if not isinstance(c, Tensor) and not isinstance(d, Tensor) and alike(self.tensors, other.tensors):
            return Vector(_sum_all(self.present(), c, other.present(), d))
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
    if _is_one(cy):
        return _plus(y, x, cx)
    return _plus(x, y, cy) if _is_one(cx) else _add(_times(x, cx), y, cy)


def _add(fresh: Tensor, y: Tensor, c: Scalar) -> Tensor:
    """Return ``fresh + c y`` in the memory of ``fresh``, which no other code holds."""
    if fresh.dtype != wide(y).dtype:
        return _plus(fresh, y, c)
    return fresh.addcmul_(wide(y), c.to(fresh.device)) if isinstance(c, Tensor) else fresh.add_(wide(y), alpha=c)


def alike(*lists: Sequence[Tensor | None]) -> bool:
    """Tell whether all are plain tensors of one wide type on one device, so that one call serves the whole list."""
    tensors = [t for ts in lists for t in ts]
    if {type(t) for t in tensors} != {Tensor}:
        return False
    kinds = set(map(KIND, tensors))
    return len(kinds) == 1 and kinds.pop()[0] not in LOW


def _sum_all(xs: list[Tensor], cx: float, ys: list[Tensor], cy: float) -> tuple[Tensor, ...]:
    """Return every ``cx x + cy y`` of lists that are :func:`alike`, without a third list."""
    if _is_one(cx):
        return torch._foreach_add(xs, ys, alpha=cy)
    if _is_one(cy):
        return torch._foreach_add(ys, xs, alpha=cx)
    scaled = torch._foreach_mul(xs, cx)
    torch._foreach_add_(scaled, ys, alpha=cy)
    return scaled


def _lerp(x: Tensor, y: Tensor, c: float) -> Tensor:
    x, y = wide(x), wide(y)
    return torch.lerp(x, y, c) if x.dtype == y.dtype else _plus(x * (1 - c), y, c)


def _sum_over_shards(values: Sequence[Tensor], of: Sequence[Tensor]) -> Tensor:
    """Return the sum of one number per tensor over all shards; one all-reduce for tensors sharded alike."""
    first = values[0].device
    groups: dict[Any, list[Tensor]] = {}
    for value, t in zip(values, of, strict=True):
        layout = (t.device_mesh, t.placements) if is_sharded(t) else None  # type: ignore[attr-defined]
        groups.setdefault(layout, []).append(value)
    sums = [_over_ranks(torch.stack([v.to(first) for v in group]).sum(), layout) for layout, group in groups.items()]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _over_ranks(part: Tensor, layout: Any) -> Tensor:
    if layout is None:
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = layout
    # of a replica every rank has the whole; everything else is a shard, also one that does not call itself so
    each = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(part, mesh, each, run_check=False).full_tensor()


def norm_of(entries: Iterable[Tensor | None], like: Vector) -> Tensor:
    """Return the Euclidean norm of entries, sharded as ``like`` is, that are made one by one and not kept."""
    squares = [torch.linalg.vector_norm(wide(local(t))).square() for t in entries if t is not None]
    return _sum_over_shards(squares, like.present()).sqrt() if squares else torch.zeros(())


def _norm(tensors: list[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    total: Tensor
    if alike(tensors):
        total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(_gathered(tensors), 2)))
        return total
    types = {t.dtype for t in tensors}
    kind = {"dtype": _sum_type(types)} if len(types) > 1 or types & LOW else {}
    sharded = any(map(is_sharded, tensors))
    norms = torch._foreach_norm(list(map(local, tensors)) if sharded else tensors, 2, **kind)
    if sharded:
        total = _sum_over_shards([n.square() for n in norms], tensors).sqrt()
    else:
        total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total


def _gathered(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, on a CPU with more than ``MANY`` small ones as one: the norm of each costs 2 microseconds."""
    if len(tensors) <= MANY or tensors[0].device.type != "cpu":
        return tensors
    large = [t for t in tensors if t.numel() > SMALL]
    if len(tensors) - len(large) <= MANY:
        return tensors
    small = [t for t in tensors if t.numel() <= SMALL] if large else tensors
    return [torch._C._nn.flatten_dense_tensors(small), *large]


def _sum_type(types: set[torch.dtype]) -> torch.dtype:
    return torch.float64 if torch.float64 in types else torch.float32


def _dot(a: Tensor, b: Tensor) -> Tensor:
    a, b = wide(a), wide(b)
    if type(a) is Tensor is type(b) and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))  # no temporary
    return (a * b).sum()
