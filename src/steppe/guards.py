"""What the optimizer refuses, and how it speaks to the user."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from steppe import check
from steppe.schedule import Schedule, as_schedule

FSDP1 = (
    "params must not be flattened by FullyShardedDataParallel, whose ranks see neither the whole norm nor single "
    "parameters: shard with torch.distributed.fsdp.fully_shard"
)
STEP = "sharpness_step"  # in every group: steps so far


def level_of_caller() -> int:
    """How far up the first frame outside torch and steppe is: hooks and schedulers wrap ``step`` in their own."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "steppe"):
        frame, level = frame.f_back, level + 1
    return level


def scheduled(rho: float | Schedule, step: int, group: dict[str, Any]) -> float:
    """A number, or what a schedule answers, checked."""
    radius = as_schedule(rho)(step, group)
    check.non_negative("rho", radius)
    return float(radius)


def refuse_grad_scaler() -> None:
    """Say what to write instead, where ``GradScaler.step`` is the caller of ``step``."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "steppe"):
        if frame.f_globals["__name__"] == "torch.amp.grad_scaler":
            raise RuntimeError(
                "scaler.step(optimizer) knows one pass of a step's several. Write loss = optimizer.step(closure, "
                "scaler=scaler), where the closure calls scaler.scale(loss).backward() and returns the loss, or "
                "optimizer.step(steppe.Batch(..., scaler=scaler)); then scaler.update()"
            )
        frame = frame.f_back


def forget_foreign(state: dict[str, Any]) -> None:
    """Drop what ``sam.py`` and its copies keep beside the base: a copy of the weights and the last perturbation.

    Their checkpoints hold no state of the base, which therefore starts anew.
    """
    foreign = {"old_p", "e_w"}
    if any(foreign & set(kept) for kept in state["state"].values()):
        warnings.warn(
            "this checkpoint is of a sam.py that does not save its base optimizer: groups and lr are loaded, "
            "moments start anew",
            UserWarning,
            stacklevel=level_of_caller(),
        )
        for p, kept in list(state["state"].items()):
            state["state"][p] = {name: value for name, value in kept.items() if name not in foreign}
            if not state["state"][p]:
                del state["state"][p]  # an empty state would keep Adam from initialising


def check_base(base: object) -> None:
    """Refuse what cannot be a base: no instance, no dense first-order method, wrapped already."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"base must be an optimizer instance, e.g. torch.optim.SGD(model.parameters(), lr=0.1), got {base!r}"
        )
    if isinstance(base, torch.optim.LBFGS | torch.optim.SparseAdam):
        raise TypeError(f"base must be a first-order optimizer of dense gradients, got {type(base).__name__}")
    if any(STEP in group for group in base.param_groups):
        raise ValueError(
            "base must be an optimizer that is not wrapped: make a new one, and load checkpoints into the wrapper"
        )


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group whose rho, parameters or options no step could use."""
    if "rho" in group:
        check.non_negative("rho", group["rho"])
    params = group["params"]
    for p in [params] if isinstance(params, Tensor) else list(params):
        t = p[1] if isinstance(p, tuple) else p
        if isinstance(t, Tensor) and t.is_complex():
            raise TypeError("params must be real: a sharpness-aware step of complex parameters is not defined here")
        if getattr(t, "_is_flat_param", False):
            raise TypeError(FSDP1)
    if group.get("differentiable"):
        raise ValueError("differentiable must be False: the step is not differentiated through")
    if group.get("maximize"):
        raise ValueError("maximize must be False: the perturbation ascends the loss; minimise the negative instead")
