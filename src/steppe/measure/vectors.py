"""Random vectors, and vectors made orthogonal to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steppe.engine.vector import TINY, Vector, wide


def gaussian(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """``z ~ N(0, I)``, the same on every device and on every rank."""
    return Vector([_drawn(p, lambda shape: torch.randn(shape, generator=generator)) for p in like])


def rademacher(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """``z`` of +1 and -1 with equal probability."""

    def draw(shape: torch.Size) -> Tensor:
        return torch.randint(2, shape, generator=generator) * 2.0 - 1.0

    return Vector([_drawn(p, draw) for p in like])


def uniform(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """``z`` uniform in the cube ``[-1, 1]^d``."""
    return Vector([_drawn(p, lambda shape: torch.rand(shape, generator=generator) * 2 - 1) for p in like])


def _drawn(p: Tensor, draw: Callable[[torch.Size], Tensor]) -> Tensor:
    """Drawn on the CPU, whole, so that devices, ranks and types see the same numbers."""
    t = draw(p.shape).to(p.device, wide(p.new_empty(0)).dtype)
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(t, p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return t


def unit(v: Vector) -> Vector:
    """``v / norm(v)``."""
    return Vector((v / (float(v.norm()) + TINY)).materialised())


def orthogonal(v: Vector, basis: Sequence[Vector]) -> Vector:
    """``v`` without its part in the span of an orthonormal basis; Gram-Schmidt twice is enough (Kahan)."""
    for _ in range(2):
        for q in basis:
            v = v - float(v.dot(q)) * q  # a number: sharded tensors do not mix with others
    return v


def orthonormal(vectors: Sequence[Vector]) -> list[Vector]:
    """An orthonormal basis of the span; what depends on the others to rounding is left out."""
    basis: list[Vector] = []
    for v in vectors:
        rest = orthogonal(v, basis)
        if rest.norm() > 1e-5 * v.norm():
            basis.append(unit(rest))
    return basis
