"""An optimizer whose parameter groups, state and checkpoints are those of another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from steppe.engine.checks import STEP, check_call, check_rule, warn
from steppe.engine.oracle import AnyRule
from steppe.engine.parameters import steps_of
from steppe.engine.passes import Closure
from steppe.engine.state import RuleState, forget_foreign, saves_as_torch, switch
from steppe.step import Pending, Skipped, Stepper
from steppe.two_calls import HalfStep


def _of_base(name: str, doc: str) -> Any:
    """Return a property that is, and sets, an attribute of the base."""
    return property(lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value), doc=doc)


class Facade(torch.optim.Optimizer):
    """An optimizer around ``base``, with a radius in every group and a rule's memory beside the base's state."""

    _stepper: Stepper  # carries out the steps: it holds the base, the rule, ``full``, the radius and the memory
    _warned: set[str]
    _pending: Pending | Skipped | None  # between backward and step: gradients wait in ``p.grad``
    _half: HalfStep | None  # between first_step and second_step

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Say how to write what other packages write differently, before the arguments are bound."""
        check_call(cls.__name__, args, options)
        return super().__new__(cls)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True makes ``GradScaler.step`` set ``grad_scale`` here, which tells that it is the caller of ``step``."""
        return self._pending is None or not self._pending.rescaled

    def _refuse_grad_scaler(self) -> None:
        if "grad_scale" in self.__dict__:
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]
            raise RuntimeError(
                "scaler.step(optimizer) knows one pass of a step's several. Write loss = optimizer.step(closure, "
                "scaler=scaler), where the closure calls scaler.scale(loss).backward() and returns the loss, or "
                "optimizer.step(steppe.Batch(..., scaler=scaler)); then scaler.update()"
            )

    @property
    def base(self) -> torch.optim.Optimizer:
        """The base optimizer."""
        return self._stepper.base

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The base optimizer, by the name that it has in ``sam.py``."""
        return self.base

    @property
    def rule(self) -> AnyRule:
        """The rule: a function from oracle to update."""
        return self._stepper.rule

    @rule.setter
    def rule(self, rule: AnyRule) -> None:
        check_rule(rule, self.base)
        self._stepper = replace(self._stepper, rule=rule)

    @property
    def full(self) -> Closure | None:
        """The closure over the larger batch of n-SAM."""
        return self._stepper.full

    @full.setter
    def full(self, full: Closure | None) -> None:
        self._stepper.full = full

    param_groups = _of_base("param_groups", "The base's parameter groups, each with its ``rho``.")
    state = _of_base("state", "The base's state, with the rule's memory beside it.")
    defaults = _of_base("defaults", "The base's defaults.")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, also those that :meth:`backward` has left."""
        super().zero_grad(set_to_none)
        if self._pending is not None:
            self._pending.dropped = True

    def _refuse_unfinished(self) -> None:
        """Refuse to begin a step where another one has begun."""
        if self._half is not None:
            raise RuntimeError("the weights are at w + eps: call second_step(), or cancel_step() to go back, first")
        if self._pending is not None and self._pending.waits:
            raise RuntimeError(
                "gradients of backward() wait for step() without a closure. A second backward() does not add to them: "
                "to accumulate, pass all micro-batches at once, optimizer.backward([batch, ...]), or run them in one "
                "closure. To drop a step, call zero_grad() first."
            )
        self._pending = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; without a radius it gets the optimizer's."""
        self._stepper.radius.add(param_group, self.base)

    def train(self) -> None:
        """Set a schedule-free base to training mode; nothing for other bases."""
        switch(self.base, "train")

    def eval(self) -> None:
        """Set a schedule-free base to evaluation mode; nothing for other bases."""
        switch(self.base, "eval")

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, in the base's format, with the rule's memory, radii and steps in it."""
        if saves_as_torch(self.base):
            return super().state_dict()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self._memory.save(self.base, self._stepper.radius.key)
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, here, in steppe 0.1 or of the base alone.

        Raises:
            ValueError: the groups are not those of this optimizer.
            KeyError: a base with a format of its own misses something.
        """
        if saves_as_torch(self.base):
            super().load_state_dict(state_dict)
            return
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self._memory.load(self.base, state_dict, self._stepper.radius.key)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def radius(self) -> float:
        """Return the largest radius of the next step."""
        return self._stepper.radius.update(self.param_groups).largest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_stepper" in state:  # unpickled or copied
            super().__setstate__(state)
        else:  # load_state_dict
            forget_foreign(state)
            radius = self._stepper.radius.key
            for new, old in zip(state["param_groups"], self.param_groups, strict=True):
                if radius in old:  # not in a group that was added to the base since
                    new.setdefault(radius, old[radius])  # a checkpoint of the base alone has none
                    new.setdefault(STEP, 0)
            self.base.__setstate__(state)
            self._memory.room = False

    @property
    def _memory(self) -> RuleState:
        return self._stepper.state

    def _count_step(self) -> int:
        steps = steps_of(self.param_groups) + 1
        for group in self.param_groups:
            group[STEP] = steps  # also of a group that was added to the base since the passes
        return steps

    def _base_step(self) -> None:
        """Step on the gradients in ``p.grad``, with one warning."""
        if any("lr" not in g or float(g["lr"]) != 0 for g in self.param_groups):
            self._warn_once(
                "step() was called without a closure: this step is the base optimizer's, not sharpness-aware. "
                "Pass a closure, or a steppe.Batch, to step()."
            )
            self.base.step()
            self._count_step()
        else:  # a distributed checkpoint is about to be loaded into what this step leaves
            self.base.step()
            self._memory.make_room(self.base)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)
