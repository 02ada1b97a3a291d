"""What a piece may read and keep from step to step: the rule's memory, and the base optimizer's state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steppe.engine.checks import kind
from steppe.engine.passes import Passes
from steppe.engine.state import PREFIX
from steppe.engine.vector import Scalar, Vector
from steppe.pieces.protocol import Declaration


@dataclass(frozen=True)
class Memory:
    """What one step may read: the rule's memory, and the base optimizer's state.

    Args:
        parameters: every parameter of the optimizer.
        state: by parameter, what the rule remembers.
        base_state: by parameter, the base optimizer's state.
        group: a parameter group; all groups hold the same numbers.
    """

    parameters: Sequence[Tensor]
    state: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    base_state: Mapping[Any, Mapping[str, Any]] = field(default_factory=dict)
    group: Mapping[str, Any] = field(default_factory=dict)

    def entries(self, state: Mapping[Any, Mapping[str, Any]], name: str) -> list[Any]:
        """Return what one of both states has of every parameter under a name; ``None`` where that is nothing."""
        return [state[p].get(name) if p in state else None for p in self.parameters]


class Remembering:
    """The questions of an :class:`~steppe.Oracle` about steps before; each name must be declared."""

    passes: Passes
    _memory: Memory
    _declares: Declaration

    @property
    def reads(self) -> frozenset[str]:
        """The names of the base's state that the rule declares."""
        return self._declares.base_state

    @property
    def group(self) -> Mapping[str, Any]:
        """The first parameter group, for schedules: its ``lr`` for one."""
        return self._memory.group

    def recall(self, name: str, default: Vector) -> Vector:
        """Return what ``remember`` kept under this name; ``default`` for a parameter that has no memory yet.

        ``ValueError`` for a name that the rule does not declare.
        """
        self._check_declared("remembers", name)
        kept = self._memory.entries(self._memory.state, PREFIX + name)
        if all(t is None for t in kept):
            return default
        missing = default.where(t is None for t in kept).materialised()
        return Vector([d if t is None else t for t, d in zip(kept, missing, strict=True)])

    def remember(self, name: str, v: Vector, rate: float = 1.0) -> None:
        """Keep ``v`` for the next step: in ``optimizer.state``, written once this step has succeeded.

        With a ``rate``, ``m <- m + rate (v - m)`` in place; a first ``m`` is ``v``. A parameter without an entry keeps
        its ``m``. ``ValueError`` for a name that the rule does not declare.
        """
        self._check_declared("remembers", name)
        self.passes.log.memory[name], self.passes.log.rates[name] = v, rate

    def recall_number(self, name: str, default: float) -> float:
        """Return the number that ``remember_number`` kept under this name, or ``default``."""
        self._check_declared("numbers", name)
        kept = float(self.group.get(PREFIX + name, math.nan))
        return default if math.isnan(kept) else kept

    def remember_number(self, name: str, value: Scalar) -> None:
        """Keep a number for the next step, in the parameter groups; micro-batches and ranks keep their mean."""
        self._check_declared("numbers", name)
        self.passes.log.kept[name] = value

    def base_state(self, name: str) -> Vector:
        """Return the base optimizer's state of this name, as its last step left it; not to be changed.

        A parameter that has none yet has no entry. ``ValueError`` for a name that the rule does not declare,
        ``TypeError`` where it is no tensor of the parameter's shape.
        """
        self._check_declared("base_state", name)
        entries = self._memory.entries(self._memory.base_state, name)
        for p, t in zip(self._memory.parameters, entries, strict=True):
            if t is not None and not (isinstance(t, Tensor) and t.shape == p.shape):
                raise TypeError(
                    f"base_state({name!r}) must be a tensor of the parameter's shape {tuple(p.shape)}, got {kind(t)}"
                )
        return Vector(entries)

    def _check_declared(self, what: str, name: str) -> None:
        known = getattr(self._declares, what)
        if name not in known:
            raise ValueError(
                f"name must be one that the rule declares as {what}, {sorted(known)}, got "
                f"{name!r}: give it declares = Declaration({what}=frozenset({{{name!r}}}))"
            )
