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

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, where the ranks exchange numbers."""
        return self.tensors[0].device

    @cached_property
    def devices(self) -> set[torch.device]:
        """The accelerators that hold parameters."""
        return {p.device for p in self.tensors if p.device.type not in ("cpu", "meta")}


class RadiusOfGroups:
    """Keeps the radius of every parameter group in ``group[key]``.

    The key is ``"rho"``, and ``"sharpness_rho"`` where the base has an option ``rho`` of its own, as Adadelta does. A
    group that was given a radius keeps it. Another has the optimizer's: a number lives in the group, like ``lr``,
    where it may be changed; a schedule writes there at every step.

    Args:
        rho: the optimizer's radius, a number or a schedule.
        base: the base optimizer, whose parameter groups are checked and written to.

    Raises:
        TypeError, ValueError: ``rho``, or a group, is no good; nothing has been changed.
    """

    def __init__(self, rho: float | Schedule, base: torch.optim.Optimizer) -> None:
        self._rho, groups = rho, base.param_groups
        self.key = "sharpness_rho" if has_rho(base) else "rho"
        checks.check_groups(groups, self.key)
        radii = [scheduled(rho, 0, group) for group in groups]
        self._own = {p for group in groups if self.key in group for p in group["params"]}  # their radius is their own
        for group, radius in zip(groups, radii, strict=True):
            group[STEP] = 0
            group.setdefault(self.key, radius)

    def add(self, group: Group, base: torch.optim.Optimizer) -> None:
        """Add a group to the base, with its radius and the steps so far."""
        params, own, steps = group["params"], self.key in group, steps_of(base.param_groups)
        if not isinstance(params, Tensor | set):
            group = {**group, "params": list(params)}  # it may be a generator
        checks.check_groups([*base.param_groups, group], self.key)
        radius = scheduled(self._rho, steps, base.defaults | group)
        base.add_param_group({self.key: radius, **group, STEP: steps})
        self._own |= set(base.param_groups[-1]["params"]) if own else set()

    def update(self, groups: Sequence[Group]) -> Radii:
        """Ask the schedule, check the numbers, and return the radius of every parameter."""
        steps, rho = steps_of(groups), []
        for group in groups:
            group.setdefault(STEP, steps)  # a group that was added to the base
            own = not callable(self._rho) or not self._own.isdisjoint(group["params"][:1])
            if self.key in group and own:
                checks.non_negative(self.key, group[self.key])
                rho.append(group[self.key])
            else:
                rho.append(scheduled(self._rho, steps, group))
        for group, r in zip(groups, rho, strict=True):
            group[self.key] = r
        return Radii([r for group, r in zip(groups, rho, strict=True) for _ in group["params"]])


def has_rho(base: Any) -> bool:
    """Tell whether a base, or one that it wraps, has an option of the name ``rho``."""
    inside = [value for value in vars(base).values() if isinstance(value, torch.optim.Optimizer)]
    inside += getattr(base, "bases", ())
    return "rho" in getattr(base, "defaults", {}) or any(map(has_rho, inside))


def parameters_of(base: torch.optim.Optimizer) -> list[Tensor]:
    """Return an optimizer's parameters, group after group."""
    return [p for group in base.param_groups for p in group["params"]]


def names_of(groups: Sequence[Group]) -> list[str] | None:
    """Return the names of all parameters; ``None`` where a group has none, as of one of several optimizers."""
    if not all("param_names" in group for group in groups):
        return None
    return [name for group in groups for name in group["param_names"]]


def steps_of(groups: Sequence[Group]) -> int:
    """Return how many steps came before."""
    return int(groups[0].get(STEP, 0))
