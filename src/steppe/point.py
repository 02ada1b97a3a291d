"""Where a step is taken, and what it saw there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from steppe.vector import Vector, is_sharded


@dataclass(frozen=True)
class Rho:
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
class Point:
    """The parameters ``w`` and what their groups say of them."""

    parameters: Sequence[Tensor]
    rho: Rho
    names: Sequence[str] | None = None

    @cached_property
    def movable(self) -> list[bool]:
        """Which parameters may be perturbed: not frozen, and rho above 0."""
        return [bool(r) and p.requires_grad for p, r in zip(self.parameters, self.rho.values, strict=True)]

    @cached_property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, as under ``fully_shard``."""
        return any(map(is_sharded, self.parameters))

    @cached_property
    def devices(self) -> set[torch.device]:
        """The accelerators that hold parameters."""
        return {p.device for p in self.parameters if p.device.type not in ("cpu", "meta")}


@dataclass
class Seen:
    """What one step saw: tensors are left on their device, so that reading them is the only cost.

    Over micro-batches, every number is the mean over the parts, weighted by their size.
    """

    numbers: dict[str, Tensor | float] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)  # of every gradient taken: are they finite?
    memory: dict[str, Vector] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # at which what is remembered moves towards it
    any_gradient: bool = False

    def add(self, share: float, other: Seen) -> None:
        """Merge what a part of the batch saw."""
        for name, value in other.numbers.items():
            self.numbers[name] = self.numbers.get(name, 0.0) + share * value
        for name, vector in other.memory.items():
            self.memory[name] = self.memory[name] + share * vector if name in self.memory else share * vector
        self.rates |= other.rates
        self.norms += other.norms
        self.any_gradient |= other.any_gradient

    def count(self, name: str, share: float = 1.0) -> None:
        """One more pass of the kind ``name`` over this share of the batch."""
        self.numbers[name] = self.numbers.get(name, 0.0) + share
