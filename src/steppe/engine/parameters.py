"""Where a step is taken, and what it saw there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from steppe.engine.vector import Vector, is_sharded


@dataclass(frozen=True)
class Radii:
    """The radius of every parameter, from its group; 0 leaves the parameter out of the ascent."""

    values: Sequence[float]

    def __mul__(self, v: Vector) -> Vector:
        """``rho v``, by group; no entry where rho is 0."""
        v = v.where(self.values)
        rhos = {r for r, t in zip(self.values, v.tensors, strict=True) if t is not None}
        return v.each(self.values) if len(rhos) > 1 else v * rhos.pop() if rhos else v

    def largest(self) -> float:
        """The largest radius of any group."""
        return max(self.values, default=0.0)


@dataclass(frozen=True)
class Parameters:
    """The parameters ``w`` and what their groups say of them."""

    tensors: Sequence[Tensor]
    rho: Radii
    names: Sequence[str] | None = None

    @cached_property
    def movable(self) -> list[bool]:
        """Which parameters may be perturbed: not frozen, and rho above 0."""
        return [bool(r) and p.requires_grad for p, r in zip(self.tensors, self.rho.values, strict=True)]

    @cached_property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, as under ``fully_shard``."""
        return any(map(is_sharded, self.tensors))

    @cached_property
    def devices(self) -> set[torch.device]:
        """The accelerators that hold parameters."""
        return {p.device for p in self.tensors if p.device.type not in ("cpu", "meta")}
