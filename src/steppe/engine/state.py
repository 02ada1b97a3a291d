"""What a rule remembers from step to step, and a checkpoint that holds it beside the base's state."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.engine.checks import STEP, bases_of, warn
from steppe.engine.parameters import parameters_of
from steppe.engine.vector import lerp_, local

PREFIX = "sharpness."
APART = "sharpness"  # the rule's memory in a checkpoint whose format is the base's own

Memory = dict[Any, dict[str, Tensor]]


@dataclass
class RuleState:
    """Named vectors, one entry a parameter, and named numbers.

    They lie in ``state[p]`` beside the base's, except where the base saves and loads in its own way: its methods may
    change, cast or drop what they do not know, so the memory lies apart.

    Args:
        names: the vectors that the rule's pieces remember.
        numbers: the numbers.
        room: whether the entries are placeholders for a distributed checkpoint.
        apart: the memory by parameter, where it is not in the base's state.
    """

    names: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    room: bool = False
    apart: Memory = field(default_factory=lambda: defaultdict(dict))
    warned: bool = False  # of entries that a base does not keep

    def of(self, base: Optimizer) -> Any:
        """Return the mapping from parameter to entries where the memory of this base's parameters lies."""
        return base.state if saves_as_torch(base) else self.apart

    def keep(
        self, base: Optimizer, parameters: Sequence[Tensor], name: str, kept: Sequence[Tensor | None], rate: float = 1.0
    ) -> None:
        """Remember the entries that are not ``None``, in place; with a ``rate``, move that far towards them."""
        state = self.of(base)
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

    def warn_of_missing(self, base: Optimizer, stepped: Sequence[Tensor], reads: frozenset[str]) -> None:
        """Warn once where the base keeps what the rule reads of some parameters that it has stepped, not of all."""
        entries = base.state
        lack = {id(p) for p in stepped if not any(entries.get(p, {}).get(name) is not None for name in reads)}
        if self.warned or not 0 < len(lack) < len(stepped):  # of none: the piece that reads it refuses the base
            return
        self.warned = True
        kinds = sorted({type(part).__name__ for part in bases_of(base) for p in parameters_of(part) if id(p) in lack})
        warn(
            f"this method reads {' or '.join(sorted(reads))} of the base optimizer, which {' and '.join(kinds)} does "
            f"not keep for {len(lack)} of {len(stepped)} parameters: these take no part in what is made of it. Give "
            "them a base that keeps it, or their groups rho=0 if that is meant"
        )

    def make_room(self, base: Optimizer) -> None:
        """Make entries of zeros for a distributed checkpoint, which is loaded into what a step with lr 0 leaves behind.

        Nothing is made where something is remembered already.
        """
        state = self.of(base)
        if any(str(name).startswith(PREFIX) for entries in state.values() for name in entries):
            return
        self.room = True
        for group in base.param_groups:
            for name in self.numbers:
                group.setdefault(PREFIX + name, math.nan)
        for p in parameters_of(base):
            if p.grad is not None:
                for name in self.names:
                    state[p].setdefault(PREFIX + name, torch.zeros_like(p, requires_grad=False))

    def clear_room(self, base: Optimizer) -> None:
        """Forget entries that no checkpoint has been loaded into."""
        if self.room:
            self.room = False
            for entries in self.of(base).values():
                for name in self.names:
                    entries.pop(PREFIX + name, None)

    def _ours(self, key: str, radius: str) -> bool:
        return key in (radius, STEP) or key in {PREFIX + name for name in self.numbers}

    # ---- checkpoints of a base that saves in its own way

    def save(self, base: Optimizer, radius: str) -> dict[str, Any]:
        """Return the base's own ``state_dict`` with the memory: in the entries of its parameters where it has them."""
        saved = dict(base.state_dict())
        if not _is_torchs(saved):
            memory = {i: dict(self.apart[p]) for i, p in enumerate(parameters_of(base)) if self.apart.get(p)}
            groups = [{k: v for k, v in group.items() if self._ours(k, radius)} for group in base.param_groups]
            return {**saved, APART: {"state": memory, "groups": groups}}
        state = dict(saved["state"])
        for i, p in zip(_indices(saved), parameters_of(base), strict=True):
            if self.apart.get(p):
                state[i] = {**state.get(i, {}), **self.apart[p]}
        return {**saved, "state": state}

    def load(self, base: Optimizer, saved: Mapping[str, Any], radius: str) -> None:
        """Load a checkpoint by the base's own ``load_state_dict``, and the memory beside it.

        Args:
            base: the base, whose groups keep their radius where the checkpoint has none.
            saved: from :meth:`save`, from the base alone, or from steppe 0.1.
            radius: the key of the radius in a group.

        Raises:
            KeyError: the base misses something in the checkpoint; nothing has been loaded.
        """
        before = [{radius: group[radius], STEP: 0} if radius in group else {} for group in base.param_groups]
        plain, memory, groups = _split(saved)
        try:
            load_all([base], [plain])
        except KeyError as error:
            raise KeyError(
                f"{type(base).__name__} finds no {error} in this checkpoint: it is of another base, or of steppe 0.1, "
                "which did not save all of the state of such a base"
            ) from error
        for i, group in enumerate(base.param_groups):
            group.update(*groups[i : i + 1])
            group |= {name: value for name, value in before[i].items() if name not in group}
        self.room = False
        self.apart.clear()
        indices = _indices(saved) if _is_torchs(saved) else range(len(parameters_of(base)))
        for i, p in zip(indices, parameters_of(base), strict=True):
            if i in memory:
                self.apart[p] = {name: t.to(p.device, p.dtype, copy=True) for name, t in memory[i].items()}


def saves_as_torch(base: Optimizer) -> bool:
    """Tell whether a base has torch's ``state_dict`` and ``load_state_dict``, not its own."""
    kind = type(base)
    return kind.state_dict is Optimizer.state_dict and kind.load_state_dict is Optimizer.load_state_dict


def load_all(bases: Sequence[Optimizer], checkpoints: Sequence[Mapping[str, Any]]) -> None:
    """Load every optimizer's checkpoint, or where one of them fails none: all get back what they had.

    A base that loads in its own way may write into its tensors, so its checkpoint is copied before.
    """
    before = [_way_back(part) for base in bases for part in bases_of(base)]
    try:
        for base, saved in zip(bases, checkpoints, strict=True):
            base.load_state_dict(saved)  # type: ignore[arg-type]
    except BaseException:
        for restore in before:
            restore()
        raise


def _way_back(base: Optimizer) -> Callable[[], None]:
    """Return what gives a base its present state again."""
    if saves_as_torch(base):  # whose method leaves the old dicts as they are
        old = {"state": base.state, "param_groups": base.param_groups}
        return lambda: vars(base).update(old)
    try:
        saved = deepcopy(base.state_dict())
    except Exception:  # some have no checkpoint before their first step, and so nothing to get back
        return lambda: None
    return lambda: base.load_state_dict(saved)


def _is_torchs(saved: Mapping[str, Any]) -> bool:
    return "state" in saved and "param_groups" in saved


def _indices(saved: Mapping[str, Any]) -> list[Any]:
    return [i for group in saved["param_groups"] for i in group["params"]]


def _split(saved: Mapping[str, Any]) -> tuple[dict[str, Any], Memory, list[dict[str, Any]]]:
    """Return the base's part of a checkpoint, the rule's memory by index, and what steppe keeps in every group."""
    ours = saved.get(APART, {"state": {}, "groups": []})
    plain = {name: value for name, value in saved.items() if name != APART}
    if not _is_torchs(saved):
        return plain, ours["state"], ours["groups"]
    state, memory = {}, {}
    for i, entries in saved["state"].items():
        kept = {k: v for k, v in entries.items() if str(k).startswith(PREFIX)} if isinstance(entries, Mapping) else {}
        if kept:
            memory[i] = kept
            entries = {k: v for k, v in entries.items() if k not in kept}
        if entries or not kept:
            state[i] = entries
    return {**plain, "state": state}, memory, []


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


def switch(optimizer: Optimizer, mode: str) -> None:
    """Set an optimizer to ``train`` or ``eval`` mode where it has modes, as those without a schedule do."""
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()
