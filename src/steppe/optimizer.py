"""The ``torch.optim.Optimizer`` around a base optimizer and a rule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from steppe.batch import Batch, as_closure
from steppe.engine import checks
from steppe.engine.checks import STEP, check_base, check_group, level_of_caller, refuse_grad_scaler
from steppe.engine.ddp import RankGroups, Sync
from steppe.engine.grad_scaler import Scaling
from steppe.engine.oracle import Closure, NotFinite, Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import Owners
from steppe.engine.state import RuleState, apart, forget_foreign
from steppe.engine.update import Update
from steppe.engine.vector import Vector, shift_
from steppe.factored.statistics import gradient_statistics
from steppe.rule import AnyRule, Plain, looks_inside, memories
from steppe.schedule import Schedule, scheduled
from steppe.telemetry import StepLog, Telemetry
from steppe.two_calls import TwoCalls, needs_more


class Options(TypedDict, total=False):
    """What every method takes beside its own parameters: see :class:`SharpnessAware`."""

    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str
    sync: Sync
    max_norm: float | None


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
    rule: AnyRule
    telemetry: Telemetry  #: what the last step saw
    full: Closure | None
    _rho: float | Schedule
    _own_rho: set[int]  # indices of groups that were given a rho: a schedule leaves them alone
    _check_finite: bool
    _keep_g: bool
    _gradient_noise: bool
    _parallel: bool | str
    _ranks: RankGroups
    _max_norm: float | None
    _scaling: Scaling
    _memory: RuleState
    _owners: Owners
    _warned: set[str]
    _half: TwoCalls | None  # between first_step and second_step
    _move: Callable[[], None] | None  # between backward and step
    _rescaled: bool  # whether the gradients in between are scaled

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
    ) -> None:
        check_base(base)
        if not callable(rule):
            raise TypeError(f"rule must be a function from Oracle to Update, got {rule!r}")
        if parallel not in ("auto", True, False):
            raise ValueError(f"parallel must be 'auto', True or False, got {parallel!r}")
        if max_norm is not None:
            checks.number("max_norm", max_norm, "a number > 0 or None", low=math.ulp(0.0))
        ranks = RankGroups(sync)
        for group in base.param_groups:
            check_group(group)
        radii = [scheduled(rho, 0, group) for group in base.param_groups]
        own = {i for i, group in enumerate(base.param_groups) if "rho" in group}
        super().__setstate__(  # the hooks of an Optimizer without groups of its own: those are the base's
            {
                "base": base,
                "rule": rule,
                "full": full,
                "telemetry": Telemetry(),
                "_rho": rho,
                "_own_rho": own,
                "_check_finite": check_finite,
                "_keep_g": cosine,
                "_gradient_noise": gradient_noise,
                "_parallel": parallel,
                "_ranks": ranks,
                "_max_norm": max_norm,
                "_scaling": Scaling(),
                "_memory": RuleState(frozenset(memories(rule))),
                "_owners": Owners(),
                "_warned": set(),
                "_half": None,
                "_move": None,
                "_rescaled": False,
            }
        )
        for group, radius in zip(base.param_groups, radii, strict=True):
            group[STEP] = 0
            group.setdefault("rho", radius)

    # ---- an Optimizer whose parameters and state are the base's

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
        check_group(param_group)
        radius = scheduled(self._rho, self._steps, self.defaults | param_group)
        self.base.add_param_group({"rho": radius, **param_group, STEP: self._steps})
        if "rho" in param_group:
            self._own_rho.add(len(self.param_groups) - 1)

    def __getstate__(self) -> dict[str, Any]:
        here: dict[str, Any] = {"_half": None, "_move": None}  # a copy is not in the middle of a step
        return {name: self.__dict__[name] for name in SharpnessAware.__annotations__} | here

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:  # unpickled or copied
            super().__setstate__(state)
        else:  # load_state_dict
            forget_foreign(state)
            for new, old in zip(state["param_groups"], self.param_groups, strict=True):
                new.setdefault("rho", old["rho"])  # a checkpoint of the base alone has none
                new.setdefault(STEP, 0)
            self.base.__setstate__(state)
            self._memory.room = False

    def __repr__(self) -> str:
        rhos = [g.get("rho") for g in self.param_groups]  # none yet in a group that was added to the base
        rho = rhos[0] if len(rhos) == 1 else rhos
        return f"{type(self).__name__}(rule={self.rule!r}, rho={rho}, base={self.base!r})"

    # ---- the step

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
        if not (self._rescaled and self._move is not None):
            refuse_grad_scaler()
        if closure is None and self._move is not None:
            move, self._move = self._move, None
            return move()
        self._refuse_half_step()
        if closure is None:
            return self._base_step()
        loss, move = self._passes(closure, scaler)
        move()
        return loss

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
        refuse_grad_scaler()
        self._refuse_half_step()
        self._move = None
        loss, self._move = self._passes(closure, scaler)
        if self.telemetry.was_skipped:
            for p in self._parameters:
                p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None
        scaler = scaler or getattr(closure, "scaler", None)
        self._rescaled = rescale and scaler is not None
        if rescale and scaler is not None:
            for p in self._parameters:
                p.grad = None if p.grad is None else scaler.scale(p.grad)
        return loss

    # ---- the step in two calls

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
        refuse_grad_scaler()
        self._refuse_half_step()
        f = self._oracle(needs_more, scaler)
        half = TwoCalls(f, self.rule if f.rho.largest() else Plain(), self._modules)
        half.look()
        self._half = half

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
        self._move = self._finish(half.see(), half.f)
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

    # ---- look and see

    def _passes(
        self, closure: Closure | Sequence[Batch], scaler: torch.amp.GradScaler | None
    ) -> tuple[Any, Callable[[], None]]:
        """The loss at ``w``, and the move that is left."""
        f = self._oracle(as_closure(closure), scaler)
        rule: AnyRule = self.rule if f.rho.largest() else Plain()
        if looks_inside(rule):
            f.batch(f"{type(self).__name__} is {rule!r}")
        if f.ranks.unprepared:
            f.rehearse()
        if self._gradient_noise:
            with f.ranks.apart():
                noise = gradient_statistics(f.batch("gradient_noise=True"), f.parameters.tensors)
            f.log.numbers["trace_V"] = noise.trace
        try:
            update = rule(f)
        except NotFinite:
            update = None
        move = self._finish(update, f)
        return f.log.numbers.get("loss", f.log.numbers.get("full_loss")), move

    def _oracle(self, closure: Closure, scaler: torch.amp.GradScaler | None = None) -> Oracle:
        """The step's oracle; whatever is wrong with its arguments is found here."""
        closure, scale = self._scaling.of_step(closure, scaler)
        names = [n for g in self.param_groups for n in g["param_names"]] if self._named else None
        parameters = self._parameters
        ranks = self._ranks.of_step(self._modules, parameters)
        rho = self._update_rho()
        self._memory.clear_room(self.state)
        return Oracle(
            closure,
            Parameters(parameters, rho, names),
            step=self._steps,
            recall=partial(self._memory.recall, self.state, parameters),
            full=self.full.scaled_by(scale.scaler if scale else None) if isinstance(self.full, Batch) else self.full,
            keep_g=self._keep_g,
            parallel=self._parallel,
            guard=self._check_finite or scale is not None,
            modules=self._modules,
            ranks=ranks,
            scale=scale,
        )

    def _update_rho(self) -> Radii:
        steps, rho = self._steps, []
        for i, g in enumerate(self.param_groups):
            g.setdefault(STEP, steps)  # a group that was added to the base
            if "rho" not in g or (callable(self._rho) and i not in self._own_rho):
                rho.append(scheduled(self._rho, steps, g))
            else:  # a number lives in the groups, like lr
                checks.non_negative("rho", g["rho"])
                rho.append(g["rho"])
        for g, r in zip(self.param_groups, rho, strict=True):
            g["rho"] = r
        return Radii([r for g, r in zip(self.param_groups, rho, strict=True) for _ in g["params"]])

    # ---- move

    def _finish(self, update: Update | None, f: Oracle) -> Callable[[], None]:
        """Hand an update whose gradients are finite on all ranks to the parameters; what is left is the move."""
        overflow = update is None or (f.guard and not _finite(f.log))
        skip = f.ranks.any(overflow, f.parameters.tensors[0].device) if f.guard else overflow
        if f.scale is not None:
            if skip and not overflow:
                f.scale.overflow(f.parameters.tensors[0].device)
            f.scale.end()
        move = _stay if skip or update is None else self._hand_over(update, f)
        self._report(f, skip)
        return move

    def _hand_over(self, update: Update, f: Oracle) -> Callable[[], None]:
        if update.beside is not None and any("lr" not in group for group in self.param_groups):
            raise TypeError("this method moves beside the base optimizer by lr: the base's groups must have an 'lr'")
        parameters = f.parameters.tensors
        update, memory = f.ranks.join(update, f.log.memory, parameters)
        if self._max_norm is not None:
            f.log.numbers["update_norm"] = update.grad.norm()
            update = update.clipped(self._max_norm)
        grads = update.grad.materialised()
        kept = apart(memory, grads)
        for p, g in zip(parameters, grads, strict=True):
            p.grad = None if g is None else g.to(getattr(p, "grad_dtype", None) or p.dtype)
        handed = [p for p in parameters if p.grad is not None]
        return partial(self._take_step, parameters, handed, update.beside, kept, f.log.rates)

    def _take_step(
        self,
        parameters: Sequence[Tensor],
        handed: Sequence[Tensor],
        beside: Vector | None,
        kept: dict[str, list[Tensor | None]],
        rates: dict[str, float],
    ) -> None:
        dropped = {id(p) for p in handed if p.grad is None}  # by the loop, after backward(): these take no step
        moving = [id(p) not in dropped for p in parameters]
        self.base.step()
        if beside is not None:
            self._move_beside(parameters, beside.where(moving))
        for name, tensors in kept.items():
            self._memory.keep(self.state, parameters, name, Vector(tensors).where(moving).tensors, rates[name])
        self._count_step()

    def _move_beside(self, parameters: Sequence[Tensor], beside: Vector) -> None:
        """``w <- w - lr beside``, each group with its own learning rate."""
        lr = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for p, s in zip(parameters, beside.tensors, strict=True):
            if s is not None:
                shift_(p, s, -lr[id(p)] * beside.scale)

    def _base_step(self) -> None:
        if any("lr" not in g or float(g["lr"]) != 0 for g in self.param_groups):
            self._warn_once(
                "step() was called without a closure: this step is the base optimizer's, not sharpness-aware. "
                "Pass a closure, or a steppe.Batch, to step()."
            )
            self.base.step()
            self._count_step()
        else:
            self.base.step()
            self._memory.make_room(self.state, self._parameters)
        self.telemetry = Telemetry(steps=self._steps, skipped=self.telemetry.skipped)

    # ---- around the step

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    @property
    def _named(self) -> bool:
        return "param_names" in self.param_groups[0]

    def _modules(self) -> Iterator[nn.Module]:
        return self._owners.modules(self._parameters)

    @property
    def _steps(self) -> int:
        return int(self.param_groups[0].get(STEP, 0))

    def _count_step(self) -> None:
        steps = self._steps + 1
        for group in self.param_groups:
            group[STEP] = steps  # also of a group that was added to the base since the passes
        self.telemetry = replace(self.telemetry, steps=self._steps)

    def _report(self, f: Oracle, skip: bool) -> None:
        numbers: dict[str, Any] = dict(f.log.numbers)
        full_loss = numbers.pop("full_loss", None)
        if "loss" in numbers and "loss_adv" in numbers:
            numbers["gap"] = numbers["loss_adv"] - numbers["loss"]
        numbers.setdefault("loss", full_loss)
        skipped = self.telemetry.skipped + skip
        self.telemetry = Telemetry(rho=f.rho.largest(), steps=self._steps, skipped=skipped, was_skipped=skip, **numbers)
        if skip:
            if f.scale is None:  # a scaler looks for its scale by overflows
                self._warn_once("a gradient is not finite: this step is skipped; telemetry.skipped counts")
        elif not f.log.any_gradient:
            self._warn_once("no parameter received a gradient: does the closure call backward()?")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=level_of_caller())


def _stay() -> None:
    """The move of a skipped step."""


def _finite(log: StepLog) -> bool:
    return not log.norms or bool(torch.stack([n.to(log.norms[0].device) for n in log.norms]).isfinite().all())
