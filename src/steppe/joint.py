"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from steppe.engine import checks
from steppe.engine.parameters import parameters_of
from steppe.engine.state import load_all, switch


@dataclass(frozen=True)
class _States(Mapping[Any, Any]):
    """The states of several optimizers as one mapping; a look-up makes no entry."""

    bases: tuple[Optimizer, ...]

    def __getitem__(self, p: Any) -> Any:
        for base in self.bases:
            if p in base.state:
                return base.state[p]
        raise KeyError(p)

    def __iter__(self) -> Iterator[Any]:
        return (p for base in self.bases for p in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self.bases)


class Joint(Optimizer):
    """Several optimizers as one: ``step`` steps each of them, on its own parameters.

    A sharpness-aware optimizer around it takes one perturbation over all parameters, whose norm is over all of them.
    ``param_groups`` lists the groups of every optimizer, in order, so a scheduler may be made for all (of the wrapper)
    or for one (of that optimizer). ``state_dict`` has the state of all of them: in torch's format where each has it,
    as ``torch.distributed.checkpoint`` needs it, else one checkpoint an optimizer.

    Args:
        bases: optimizer instances, each with parameters of its own.

    Raises:
        TypeError: one of them cannot be the base of a sharpness-aware optimizer.
        ValueError: there is none; one is wrapped already; a parameter is in two.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> rest = [p for p in model.parameters() if p.ndim != 2]
        >>> muon, adamw = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-3)
        >>> optimizer = steppe.SAM(steppe.Joint([muon, adamw]), rho=0.05)  # or steppe.SAM([muon, adamw])
    """

    bases: tuple[Optimizer, ...]

    def __init__(self, bases: Iterable[Optimizer]) -> None:
        bases = tuple(bases)
        if not bases:
            raise ValueError("bases must be one optimizer or more, got none")
        for base in bases:
            checks.check_base(base)
        parameters = [p for base in bases for p in parameters_of(base)]
        if len({id(p) for p in parameters}) < len(parameters):
            raise ValueError("bases must have parameters of their own: one parameter is listed twice")
        # not super().__init__, which would make groups: they are the bases'
        self.__setstate__({"bases": bases})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.defaults: dict[str, Any] = {}  # OneCycleLR and CyclicLR look here for a momentum that all groups have
        super().__setstate__(state)

    def __getstate__(self) -> dict[str, Any]:
        return {"bases": self.bases}

    def __repr__(self) -> str:
        return f"Joint([{', '.join(map(repr, self.bases))}])"

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of every optimizer, in order."""
        return [group for base in self.bases for group in base.param_groups]

    @property
    def state(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """The state of every parameter, from the optimizer that has it: a view, not a copy."""
        return _States(self.bases)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimizer on the gradients in ``p.grad``.

        Args:
            closure: run first, once for all.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for base in self.bases:
            base.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the group must be added to one of the optimizers.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "add the group to the optimizer that shall step it, e.g. optimizer.base.bases[0].add_param_group(group)"
        )

    def train(self) -> None:
        """Set schedule-free optimizers to training mode."""
        for base in self.bases:
            switch(base, "train")

    def eval(self) -> None:
        """Set schedule-free optimizers to evaluation mode."""
        for base in self.bases:
            switch(base, "eval")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every optimizer."""
        parts = [base.state_dict() for base in self.bases]
        if not all(map(_is_plain, parts)):
            return {"bases": parts}
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        start = 0
        for part in parts:
            state |= {i + start: entries for i, entries in part["state"].items()}
            groups += [{**g, "params": [i + start for i in g["params"]]} for g in part["param_groups"]]
            start += sum(len(group["params"]) for group in part["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of every optimizer.

        Raises:
            ValueError: the checkpoint is of other optimizers or groups. After this and any other exception, such as
                that of a base with a format of its own, no optimizer has loaded anything.
        """
        parts = state_dict["bases"] if "bases" in state_dict else self._split(state_dict)
        if len(parts) != len(self.bases):
            raise ValueError(f"the checkpoint must be of {len(self.bases)} optimizers, got {len(parts)}")
        for i, (base, part) in enumerate(zip(self.bases, parts, strict=True)):
            own = part.get("param_groups")
            if own is not None and [len(g["params"]) for g in own] != [len(g["params"]) for g in base.param_groups]:
                raise ValueError(
                    f"the checkpoint must have the groups of this optimizer, got others for bases[{i}], "
                    f"{type(base).__name__}"
                )
        load_all(self.bases, parts)

    def _split(self, saved: dict[str, Any]) -> list[dict[str, Any]]:
        """Return every optimizer's part of a checkpoint in torch's format."""
        sizes = [[len(group["params"]) for group in base.param_groups] for base in self.bases]
        if [len(group["params"]) for group in saved["param_groups"]] != [n for size in sizes for n in size]:
            raise ValueError("the checkpoint must have the groups of this optimizer, got others")
        parts, groups = [], iter(saved["param_groups"])
        for size in sizes:
            own = [next(groups) for _ in size]
            indices = {i for group in own for i in group["params"]}
            parts.append({"state": {i: s for i, s in saved["state"].items() if i in indices}, "param_groups": own})
        return parts


def as_one(base: object) -> Optimizer:
    """Return a list of optimizers as their :class:`Joint`, and an optimizer unchanged.

    Raises:
        TypeError, ValueError: it cannot be the base of a sharpness-aware optimizer.
    """
    if isinstance(base, list | tuple):
        return Joint(base)
    return checks.check_base(base)


def _is_plain(saved: dict[str, Any]) -> bool:
    """Tell whether a checkpoint has the states of parameters and the groups, and nothing else."""
    return saved.keys() == {"state", "param_groups"} and all(isinstance(i, int) for i in saved["state"])
