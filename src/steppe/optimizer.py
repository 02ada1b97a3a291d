"""The ``torch.optim.Optimizer`` around a base optimizer and a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import nn
from torch._compile import _disable_dynamo

from steppe.batch import Batch, as_closure
from steppe.engine import checks
from steppe.engine.ddp import RankGroups, Sync
from steppe.engine.modules import Modules
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.parameters import RadiusOfGroups, steps_of
from steppe.engine.passes import Closure
from steppe.engine.state import RuleState, forget_foreign
from steppe.pieces.protocol import declared
from steppe.schedule import Schedule
from steppe.step import HalfStep, Pending, Skipped, Stepper
from steppe.telemetry import Telemetry

STEP = checks.STEP


class Options(TypedDict, total=False):
    """What every method takes beside its own parameters: see :class:`SharpnessAware`."""

    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str
    sync: Sync
    max_norm: float | None
    model: nn.Module | None


class SharpnessAware(torch.optim.Optimizer):
    """Any base optimizer, made sharpness-aware by a rule.

    ``param_groups``, ``state``, ``defaults`` and ``state_dict`` are the base's. Each group has a ``rho``: its own where
    the base's group was given one (0 keeps the group out of the ascent), else the optimizer's. The rule's memory lives
    in ``state[p]`` beside the base's, so one checkpoint resumes both, bit for bit.

    Parameters in bfloat16 round the perturbed weights: norms and ``eps`` are computed in float32, but a weight moves
    only where its ``eps`` exceeds half its last place. With standard-normal gradients on 25 M weights of size 0.02, rho
    0.05 moves 12 % of them (length 0.6 rho, cosine 0.46 to the direction meant), rho 0.5 68 % (1.04 rho, 0.95): keep
    the parameters in float32 under ``torch.autocast``, or take a larger rho.

    Args:
        base: an optimizer instance; it sees the combined gradient, once a step.
        rule: ``(Oracle) -> Update``, for example :class:`~steppe.Rule`.
        rho: radius of the perturbation, in the units of the rule's geometry, or a schedule (:mod:`steppe.schedule`).
        full: closure over the larger batch of n-SAM (:class:`~steppe.OnFull`).
        check_finite: skip steps whose gradients are not finite; the one place where a step waits for its device (but
            for messages between ranks, rehearsals of shared passes, and ESAM's choice from accumulated batches).
        parallel: run micro-batches in two passes over the whole batch: ``"auto"`` where the model allows it, ``True``
            or an error, ``False`` never (:mod:`steppe.factored`).
        cosine: keep ``g`` for ``telemetry.cosine``, at the cost of one copy of the parameters.
        sync: under ``DistributedDataParallel``, whose gradients make the perturbation: ``"local"`` (each rank its own:
            m-SAM across ranks, as published; what ``"auto"`` means), ``"global"`` (all ranks share one; every pass is
            averaged), or a number of neighbouring ranks that share one. The gradient that the base sees is averaged
            over all ranks in each case. With sharded parameters (``fully_shard``) all ranks share one.
        max_norm: clip the gradient that the base sees to this norm, over all parameters
            (:meth:`~steppe.Update.clipped`).
        model: the module that plain closures run, where steppe cannot find it among the variables that the closure
            refers to (:mod:`steppe.engine.modules`): its running statistics are protected, and DDP is told when to
            average. Needed for ``first_step`` and ``second_step`` under DDP.
        gradient_noise: measure ``telemetry.trace_V`` before every step, at the cost of a pass; needs a
            :class:`~steppe.Batch` and a model that factors (:func:`~steppe.factored.gradient_statistics`).

    Raises:
        TypeError: ``base`` is no optimizer instance, or one of another kind (L-BFGS, SparseAdam); complex parameters.
        ValueError: ``rho`` is negative, ``base`` is wrapped already, a group maximises or is differentiable, or
            ``parallel``, ``sync`` or ``max_norm`` is none of the above.

    Example:
        >>> base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = SharpnessAware(base, Rule(geometry=Adaptive(), combine=Weighted(0.9)), rho=0.5)
        >>> loss = optimizer.step(Batch.supervised(model, criterion, inputs, targets))
    """

    base: torch.optim.Optimizer
    telemetry: Telemetry  #: what the last step saw
    _stepper: Stepper
    _pending: Pending | Skipped | None  # between backward and step
    _half: HalfStep | None  # between first_step and second_step
    _warned: set[str]

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rule: AnyRule,
        rho: float | Schedule = 0.05,
        *,
        full: Closure | None = None,
        check_finite: bool = True,
        cosine: bool = False,
        gradient_noise: bool = False,
        parallel: bool | str = "auto",
        sync: Sync = "auto",
        max_norm: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        checks.check_base(base)
        if not callable(rule):
            raise TypeError(f"rule must be a function from Oracle to Update, got {rule!r}")
        if parallel not in ("auto", True, False):
            raise ValueError(f"parallel must be 'auto', True or False, got {parallel!r}")
        if max_norm is not None:
            checks.number("max_norm", max_norm, "a number > 0 or None", low=math.ulp(0.0))
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
        ranks, state = RankGroups(sync), RuleState(declared(rule).remembers)
        radius = RadiusOfGroups(rho, base.param_groups)
        options = (check_finite, cosine, gradient_noise, parallel, max_norm)
        super().__setstate__(  # the hooks of an Optimizer without groups of its own: those are the base's
            {
                "base": base,
                "telemetry": Telemetry(),
                "_stepper": Stepper(base, rule, radius, full, *options, ranks, Modules(model), state),
                "_pending": None,
                "_half": None,
                "_warned": set(),
            }
        )

    # ---- an Optimizer whose parameters and state are the base's

    @property
    def rule(self) -> AnyRule:
        """The rule: a function from oracle to update."""
        return self._stepper.rule

    @property
    def full(self) -> Closure | None:
        """The closure over the larger batch of n-SAM."""
        return self._stepper.full

    @full.setter
    def full(self, full: Closure | None) -> None:
        self._stepper.full = full

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's parameter groups, each with its ``rho``."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's state, with the rule's memory beside it."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's defaults."""
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its ``rho`` is the optimizer's unless it has one of its own."""
        groups = self.param_groups
        group = self._stepper.radius.checked(param_group, self.defaults, steps_of(groups), len(groups))
        self.base.add_param_group(group)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in SharpnessAware.__annotations__}  # schedulers patch ``step``
        return kept | {"_half": None, "_pending": None}  # a copy is not in the middle of a step

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:  # unpickled or copied
            super().__setstate__(state)
        else:  # load_state_dict
            forget_foreign(state)
            for new, old in zip(state["param_groups"], self.param_groups, strict=True):
                new.setdefault("rho", old["rho"])  # a checkpoint of the base alone has none
                new.setdefault(STEP, 0)
            self.base.__setstate__(state)
            self._stepper.state.room = False

    def __repr__(self) -> str:
        rhos = [g.get("rho") for g in self.param_groups]  # none yet in a group that was added to the base
        rho = rhos[0] if len(rhos) == 1 else rhos
        return f"{type(self).__name__}(rule={self.rule!r}, rho={rho}, base={self.base!r})"

    # ---- the step

    @_disable_dynamo  # a step moves weights between passes: a compiled loop runs it as it is
    @torch.no_grad()
    def step(
        self, closure: Closure | Sequence[Batch] | None = None, *, scaler: torch.amp.GradScaler | None = None
    ) -> Any:
        """One sharpness-aware step.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss; called as often as the method
                needs. A :class:`~steppe.Batch` for methods that look inside the batch; a list of them to accumulate
                (:class:`~steppe.Batches`). Without one, the step that :meth:`backward` has begun is finished; where
                there is none, the base steps on the gradients that are there, with one warning.
            scaler: the scaler that the closure scales its loss by before ``backward()``; it returns the loss unscaled.
                (A ``Batch`` scales its own.) Gradients are unscaled, an overflow in any pass skips the step, and
                ``scaler.update()``, to be called after every step, backs off.

        Returns:
            The loss at ``w`` (``L(w)``, not that at ``w + eps``); ``None`` without a closure.

        Raises:
            TypeError: the method looks inside the batch and ``closure`` is no ``Batch``; nothing has been changed.
            ValueError: a group's ``rho`` is negative or not finite; nothing has been changed.
            RuntimeError: called by ``scaler.step``, or twice without ``scaler.update()`` between, or after
                ``first_step``; nothing has been changed.
        """
        self._refuse_grad_scaler()
        if closure is None and self._pending is not None:
            pending, self._pending = self._pending, None
            self._move(pending)
            return None
        self._refuse_half_step()
        if closure is None:
            return self._base_step()
        f, pending = self._stepper.passes(as_closure(closure), scaler)
        self._report(f, pending)
        self._move(pending)
        return f.passes.log.loss

    @_disable_dynamo
    @torch.no_grad()
    def backward(
        self,
        closure: Closure | Sequence[Batch],
        *,
        scaler: torch.amp.GradScaler | None = None,
        rescale: bool = False,
    ) -> Any:
        """A step's passes without its move, in place of ``loss.backward()``.

        Every ``p.grad`` is left with what the base will see, and ``step()``, without a closure, moves. So loops and
        frameworks that clip, log or check gradients before ``step()`` do so to the combined gradient, once a step.
        WSAM's term beside the base is not among the gradients. Called again before ``step()``, it starts anew. Of a
        step that must be skipped the gradients are NaN, and ``step()`` moves nothing.

        Args:
            closure: as for :meth:`step`.
            scaler: as for :meth:`step`; the gradients are left unscaled.
            rescale: leave them scaled again, as after ``scaler.scale(loss).backward()``, for frameworks that call
                ``scaler.unscale_``, ``scaler.step`` and ``scaler.update`` by themselves.

        Returns:
            The loss at ``w``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`step`; nothing has been changed.

        Example:
            >>> loss = optimizer.backward(closure)
            >>> torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            >>> optimizer.step()
        """
        self._refuse_half_step()
        self._pending = None
        f, pending = self._stepper.passes(as_closure(closure), scaler)
        self._report(f, pending)
        parameters = f.passes.parameters.tensors
        if isinstance(pending, Skipped):
            for p in parameters:
                p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
        scaler = scaler or getattr(closure, "scaler", None)
        if rescale and scaler is not None:
            pending = replace(pending, rescaled=True)
            for p in parameters:
                p.grad = None if p.grad is None else scaler.scale(p.grad)
        self._pending = pending
        return f.passes.log.loss

    # ---- the step in two calls

    @_disable_dynamo
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take the gradients that are there as ``g`` and move to ``w + eps``: the first half of a step.

        Between ``first_step`` and ``second_step`` run forward and backward once more on the same batch. Prefer ``step``
        with a closure, which also draws the same dropout masks in both passes; this is the calling convention of the
        widely copied ``sam.py``. Normalisation statistics see the first forward alone here too.

        Args:
            zero_grad: accepted for that convention: gradients are dropped in any case.
            scaler: the scaler that the losses of both passes are scaled by; ``scaler.update()`` after ``second_step``.

        Raises:
            TypeError: the method needs more than two gradients.
            RuntimeError: called twice without ``second_step`` between, or under ``scaler.step``.

        Example:
            >>> criterion(model(x), y).backward()
            >>> optimizer.first_step(zero_grad=True)
            >>> criterion(model(x), y).backward()
            >>> optimizer.second_step(zero_grad=True)
        """
        self._refuse_half_step()
        half = self._stepper.half_step(scaler)
        half.look()
        self._half = half

    @_disable_dynamo
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Take the gradients that are there as ``g_adv``, move back to ``w`` bit for bit, and step.

        Args:
            zero_grad: drop the gradients afterwards.

        Raises:
            RuntimeError: ``first_step`` was not called before.
        """
        if self._half is None:
            raise RuntimeError("call first_step() before second_step()")
        half, self._half = self._half, None
        self._pending = self._stepper.second_half(half)
        self._report(half.f, self._pending)
        self.step()  # so that hooks and schedulers of this optimizer see a step
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def cancel_step(self) -> None:
        """Move back to ``w`` after ``first_step``, and forget the step."""
        half, self._half = self._half, None
        if half is not None:
            half.leave()

    def _refuse_half_step(self) -> None:
        if self._half is not None:
            raise RuntimeError("the weights are at w + eps: call second_step(), or cancel_step() to go back, first")

    def _refuse_grad_scaler(self) -> None:
        """Refuse a step that ``GradScaler.step`` takes, except after ``backward(rescale=True)``."""
        if "grad_scale" in self.__dict__:
            del self.__dict__["grad_scale"], self.__dict__["found_inf"]
            raise RuntimeError(
                "scaler.step(optimizer) knows one pass of a step's several. Write loss = optimizer.step(closure, "
                "scaler=scaler), where the closure calls scaler.scale(loss).backward() and returns the loss, or "
                "optimizer.step(steppe.Batch(..., scaler=scaler)); then scaler.update()"
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asks ``GradScaler.step`` to leave ``grad_scale`` here, which tells that it is the caller of ``step``."""
        return self._pending is None or not self._pending.rescaled

    # ---- around the step

    def _move(self, pending: Pending | Skipped) -> None:
        pending.move(self.base, self._stepper.state)
        if isinstance(pending, Pending):
            self._count_step()

    def _base_step(self) -> None:
        if any("lr" not in g or float(g["lr"]) != 0 for g in self.param_groups):
            self._warn_once(
                "step() was called without a closure: this step is the base optimizer's, not sharpness-aware. "
                "Pass a closure, or a steppe.Batch, to step()."
            )
            self.base.step()
            self._count_step()
        else:  # a distributed checkpoint is about to be loaded into what this step leaves
            self.base.step()
            self._stepper.state.make_room(self.state, [p for g in self.param_groups for p in g["params"]])
        self.telemetry = Telemetry(steps=steps_of(self.param_groups), skipped=self.telemetry.skipped)

    def _count_step(self) -> None:
        steps = steps_of(self.param_groups) + 1
        for group in self.param_groups:
            group[STEP] = steps  # also of a group that was added to the base since the passes
        self.telemetry = replace(self.telemetry, steps=steps)

    def _report(self, f: Oracle, pending: Pending | Skipped) -> None:
        log, skip = f.passes.log, isinstance(pending, Skipped)
        self.telemetry = log.telemetry(
            rho=f.rho.largest(),
            steps=steps_of(self.param_groups),
            skipped=self.telemetry.skipped + skip,
            was_skipped=skip,
        )
        if skip and f.passes.scale is None:  # a scaler looks for its scale by overflows
            self._warn_once("a gradient is not finite: this step is skipped; telemetry.skipped counts")
        elif not skip and not log.any_gradient:
            self._warn_once("no parameter received a gradient: does the closure call backward()?")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            checks.warn(message)
