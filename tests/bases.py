"""Base optimizers of the shapes that published ones have: state of their own, outside ``state``, nested, quantised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Warmed(Optimizer):
    """Counts its steps in an attribute, which its ``state_dict`` adds (as SPAM and Ranger21)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.steps = state_dict.get("steps", 0)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad)
                    p.sub_(m, alpha=group["lr"] * min(1.0, self.steps / 5))


class Quantised(Optimizer):
    """Keeps its moment in 8 bits, which torch's ``load_state_dict`` would cast (as bitsandbytes)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        groups = [dict(group) for group in state_dict["param_groups"]]
        for new, old in zip(groups, self.param_groups, strict=True):
            new["params"] = old["params"]
        saved = {parameters[i]: {k: v.clone() for k, v in s.items()} for i, s in state_dict["state"].items()}
        self.__setstate__({"state": defaultdict(dict, saved), "param_groups": groups})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state["m"].to(p.dtype) - 128 if state else torch.zeros_like(p)
                assert not state or state["m"].dtype == torch.uint8
                assert all(k in ("m", "scale") for k in state), "what is not this optimizer's"
                m = 0.9 * m * state.get("scale", torch.zeros(())) + p.grad
                state["scale"] = (m.abs().max() / 127).float()
                state["m"] = (m / state["scale"] + 128).round().to(torch.uint8)
                p.sub_(m, alpha=group["lr"])


class Slow(Optimizer):
    """Slow weights around another optimizer, with a checkpoint of its own format (as Lookahead)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.defaults = optimizer.defaults
        self.state = defaultdict(dict)
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("optimizer", "count", "defaults", "state")}

    def state_dict(self) -> dict[str, Any]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        slow = {i: self.state[p] for i, p in enumerate(parameters) if p in self.state}
        return {"slow": slow, "count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.count = state_dict["count"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state = defaultdict(dict, {parameters[i]: dict(s) for i, s in state_dict["slow"].items()})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p]["slow"] = p.detach().clone()
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for p, state in self.state.items():
                state["slow"].lerp_(p, 0.5)
                p.copy_(state["slow"])


class Behind(Optimizer):
    """Another optimizer after a change of the gradients: state and checkpoint are that one's (as OrthoGrad)."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.defaults = optimizer, {}
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "defaults": self.defaults}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-0.1, 0.1)
        self.optimizer.step()


class Tuned(Behind):
    """Has an entry in ``state`` that belongs to no parameter, by parameter (as TRAC)."""

    def state_dict(self) -> dict[str, Any]:
        saved = self.optimizer.state_dict()
        parameters = [p for group in self.param_groups for p in group["params"]]
        sums = self.state["sums"]
        return {**saved, "state": {**saved["state"], "sums": [sums[p] for p in parameters]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict["state"])
        sums = state.pop("sums")
        self.optimizer.load_state_dict({**state_dict, "state": state})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state["sums"] = dict(zip(parameters, [t.clone() for t in sums], strict=True))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        super().step()
        sums = self.state["sums"]
        for group in self.param_groups:
            for p in group["params"]:
                sums[p] = sums.get(p, 0) + p.detach().abs()
                p.sub_(sums[p], alpha=1e-3)


class Recent(Optimizer):
    """Keeps a list, a number and a dict in ``state[p]``; torch saves it."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"last": [], "count": 0, "norms": {"first": p.grad.norm()}}
                state["last"] = [*state["last"][-2:], p.grad / state["norms"]["first"]]
                state["count"] += 1
                p.sub_(sum(state["last"]) / state["count"], alpha=group["lr"])
