"""The parameters of a step, and the radius of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.checks import STEP
from steppe.engine.vector import Vector, is_sharded
from steppe.schedule import Schedule, scheduled

Group = dict[str, Any]  # a parameter group


@dataclass(frozen=True)
class Radii:
    """The radius of every parameter, from its group; 0 leaves the parameter out of the ascent."""

    values: Sequence[float]

    def __mul__(self, v: Vector) -> Vector:
        """Return ``rho v``, by group; no entry where rho is 0."""
        v = v.where(self.values)
        rhos = {r for r, t in zip(self.values, v.tensors, strict=True) if t is not None}
        return v.each(self.values) if len(rhos) > 1 else v * rhos.pop() if rhos else v

    def largest(self) -> float:
        """Return the largest radius of any group."""
        return max(self.values, default=0.0)


@dataclass(frozen=True)
class Parameters:
    """The parameters ``w``, with their radii and names."""

    tensors: Sequence[Tensor]
    rho: Radii
    names: Sequence[str] | None = None

    @cached_property
    def movable(self) -> list[bool]:
        """Whether each parameter may be perturbed: not frozen, and rho above 0."""
        return [bool(r) and p.requires_grad for p, r in zip(self.tensors, self.rho.values, strict=True)]

    @cached_property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, as under ``fully_shard``."""
        return any(map(is_sharded, self.tensors))

    @cached_property
    def devices(self) -> set[torch.device]:
        """The accelerators that hold parameters."""
        return {p.device for p in self.tensors if p.device.type not in ("cpu", "meta")}


class RadiusOfGroups:
    """Keeps the radius of every parameter group in ``group["rho"]``.

    A group that was given a ``rho`` keeps it. Another has the optimizer's: a number lives in the group, like ``lr``,
    where it may be changed; a schedule writes there at every step.

    Args:
        rho: the optimizer's radius, a number or a schedule.
        groups: the base's parameter groups, which are checked and written to.

    Raises:
        TypeError, ValueError: ``rho``, or a group, is no good; nothing has been changed.
    """

    def __init__(self, rho: float | Schedule, groups: Sequence[Group]) -> None:
        self._rho = rho
        for group in groups:
            checks.check_group(group)
        radii = [scheduled(rho, 0, group) for group in groups]
        self._own = {i for i, group in enumerate(groups) if "rho" in group}
        for group, radius in zip(groups, radii, strict=True):
            group[STEP] = 0
            group.setdefault("rho", radius)

    def checked(self, group: Group, defaults: Group, steps: int) -> Group:
        """Return a new group with its radius and the steps so far, checked."""
        params = group["params"]
        if not isinstance(params, Tensor | set):
            group = {**group, "params": list(params)}  # it may be a generator
        checks.check_group(group)
        return {"rho": scheduled(self._rho, steps, defaults | group), **group, STEP: steps}

    def added(self, own: bool, index: int) -> None:
        """Note a group that the base has accepted, and whether its radius is its own."""
        self._own |= {index} if own else set()

    def update(self, groups: Sequence[Group]) -> Radii:
        """Ask the schedule, check the numbers, and return the radius of every parameter."""
        steps, rho = steps_of(groups), []
        for i, group in enumerate(groups):
            group.setdefault(STEP, steps)  # a group that was added to the base
            if "rho" not in group or (callable(self._rho) and i not in self._own):
                rho.append(scheduled(self._rho, steps, group))
            else:
                checks.non_negative("rho", group["rho"])
                rho.append(group["rho"])
        for group, r in zip(groups, rho, strict=True):
            group["rho"] = r
        return Radii([r for group, r in zip(groups, rho, strict=True) for _ in group["params"]])


def steps_of(groups: Sequence[Group]) -> int:
    """Return how many steps came before."""
    return int(groups[0].get(STEP, 0))
