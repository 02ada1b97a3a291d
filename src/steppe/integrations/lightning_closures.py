"""The closures that Lightning passes to ``step()`` where both passes have run, or where there is nothing to run."""

from functools import partial
from typing import Any

from lightning.pytorch.core.optimizer import do_nothing_closure
from torch.optim import Optimizer

from steppe.optimizer import SharpnessAware

Call = tuple[tuple[Any, ...], dict[str, Any]]


def run_closure_first(optimizer: Any, args: Any, kwargs: dict[str, Any]) -> Call:
    """Run Lightning's closure, which by now only calls hooks and clips; ``step()`` then moves without it."""
    if "closure" in kwargs:
        kwargs["closure"]()
    return (optimizer,), {}


def step_without_stand_in(optimizer: Optimizer) -> None:
    """Let ``step()`` without a closure, in manual optimisation, reach a steppe optimizer as that.

    Lightning puts a closure that does nothing in the place of none. Without one, ``step()`` moves by the gradients that
    ``backward()`` has left, or warns that it is the base optimizer's step.
    """
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if isinstance(optimizer, SharpnessAware) and _without_stand_in not in hooks:
        optimizer.register_step_pre_hook(_without_stand_in)


def _without_stand_in(optimizer: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
    closure = kwargs.get("closure")
    nothing = isinstance(closure, partial) and closure.args[-1:] == (do_nothing_closure,)
    return run_closure_first(optimizer, args, kwargs) if nothing else None
