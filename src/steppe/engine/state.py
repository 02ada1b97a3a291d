"""What a rule remembers from step to step: tensors in ``state[p]`` beside the base's state, numbers in the groups."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steppe.engine.checks import warn
from steppe.engine.vector import lerp_, local

PREFIX = "sharpness."


@dataclass
class RuleState:
    """Named vectors, one entry a parameter, and named numbers.

    Args:
        names: the vectors that the rule's pieces remember.
        numbers: the numbers.
        room: whether the entries are placeholders for a distributed checkpoint.
    """

    names: frozenset[str]
    numbers: frozenset[str] = frozenset()
    room: bool = False

    def keep(
        self, state: Any, parameters: Sequence[Tensor], name: str, kept: Sequence[Tensor | None], rate: float = 1.0
    ) -> None:
        """Remember the entries that are not ``None``, in place; with a ``rate``, move that far towards them."""
        for p, t in zip(parameters, kept, strict=True):
            if t is None:
                continue
            old = state[p].get(PREFIX + name)
            if old is None:
                state[p][PREFIX + name] = t.detach().to(p.dtype, copy=True)
            elif rate == 1.0:
                old.copy_(t)
            else:
                lerp_(local(old), local(t), rate)

    def make_room(self, state: Any, groups: Iterable[dict[str, Any]]) -> None:
        """Make entries of zeros for a distributed checkpoint, which is loaded into what a step with lr 0 leaves behind.

        Nothing is made where something is remembered already.
        """
        if any(name.startswith(PREFIX) for entries in state.values() for name in entries):
            return
        self.room = True
        for group in groups:
            for name in self.numbers:
                group.setdefault(PREFIX + name, math.nan)
            for p in group["params"]:
                if p.grad is not None:
                    for name in self.names:
                        state[p].setdefault(PREFIX + name, torch.zeros_like(p, requires_grad=False))

    def clear_room(self, state: Any) -> None:
        """Forget entries that no checkpoint has been loaded into."""
        if self.room:
            self.room = False
            for entries in state.values():
                for name in self.names:
                    entries.pop(PREFIX + name, None)


def forget_foreign(state: dict[str, Any]) -> None:
    """Drop what ``sam.py`` and its copies keep beside the base: a copy of the weights and the last perturbation.

    Their checkpoints hold no state of the base, which therefore starts anew.
    """
    foreign = {"old_p", "e_w"}
    if any(foreign & set(kept) for kept in state["state"].values()):
        warn(
            "this checkpoint is of a sam.py that does not save its base optimizer: groups and lr are loaded, "
            "moments start anew"
        )
        for p, kept in list(state["state"].items()):
            state["state"][p] = {name: value for name, value in kept.items() if name not in foreign}
            if not state["state"][p]:
                del state["state"][p]  # an empty state would keep Adam from initialising
