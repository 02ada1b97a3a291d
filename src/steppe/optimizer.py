"""The ``torch.optim.Optimizer`` around a base optimizer and a rule."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from steppe import check
from steppe.factored.statistics import gradient_statistics
from steppe.guards import STEP, check_base, check_group, level_of_caller, refuse_grad_scaler, scheduled
from steppe.oracle import Closure, NotFinite, Oracle
from steppe.point import Point, Rho, Seen
from steppe.replay import owners
from steppe.rule import AnyRule, Plain, looks_inside
from steppe.schedule import Schedule
from steppe.telemetry import Telemetry
from steppe.update import Update
from steppe.vector import Vector, shift_

MEMORY = "sharpness."  # prefix of a rule's memory in state[p]


class Options(TypedDict, total=False):
    """What every method takes beside its own parameters: see :class:`SharpnessAware`."""

    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str


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
        check_finite: skip steps whose gradients are not finite; the one place where a step waits for its device.
        parallel: run micro-batches in two passes over the whole batch: ``"auto"`` where the model allows it, ``True``
            or an error, ``False`` never (:mod:`steppe.factored`).
        cosine: keep ``g`` for ``telemetry.cosine``, at the cost of one copy of the parameters.
        gradient_noise: measure ``telemetry.trace_V`` before every step, at the cost of a pass; needs a
            :class:`~steppe.Batch` and a model that factors (:func:`~steppe.factored.gradient_statistics`).

    Raises:
        TypeError: ``base`` is no optimizer instance, or one of another kind (L-BFGS, SparseAdam); complex parameters.
        ValueError: ``rho`` is negative, ``base`` is wrapped already, or a group maximises or is differentiable.

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
    _warned: set[str]
    _owners: tuple[int, list[weakref.ref[nn.Module]]]
    _pending: Callable[[], None] | None  # the move of a step whose passes are done

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
    ) -> None:
        check_base(base)
        if not callable(rule):
            raise TypeError(f"rule must be a function from Oracle to Update, got {rule!r}")
        if parallel not in ("auto", True, False):
            raise ValueError(f"parallel must be 'auto', True or False, got {parallel!r}")
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
                "_warned": set(),
                "_owners": (0, []),
                "_pending": None,
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
        passing: dict[str, Any] = {"_owners": (0, []), "_pending": None}
        return {name: self.__dict__[name] for name in SharpnessAware.__annotations__} | passing

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" in state:  # unpickled or copied
            super().__setstate__(state)
        else:  # load_state_dict
            for new, old in zip(state["param_groups"], self.param_groups, strict=True):
                new.setdefault("rho", old["rho"])  # a checkpoint of the base alone has none
                new.setdefault(STEP, 0)
            self.base.__setstate__(state)

    def __repr__(self) -> str:
        rho = self.param_groups[0]["rho"] if len(self.param_groups) == 1 else [g["rho"] for g in self.param_groups]
        return f"{type(self).__name__}(rule={self.rule!r}, rho={rho}, base={self.base!r})"

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One sharpness-aware step.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss; called as often as the method
                needs. A :class:`~steppe.Batch` for methods that look inside the batch. Without one, the step that
                :meth:`backward` has begun is finished; where there is none, the base steps on the gradients that are
                there, with one warning.

        Returns:
            The loss at ``w`` (``L(w)``, not that at ``w + eps``); ``None`` without a closure.

        Raises:
            TypeError: the method looks inside the batch and ``closure`` is no ``Batch``; nothing has been changed.
            ValueError: a group's ``rho`` is negative or not finite; nothing has been changed.
        """
        pending, self._pending = self._pending, None
        if closure is None and pending is not None:
            pending()
            return None
        refuse_grad_scaler()
        if closure is None:
            return self._base_step()
        loss, move = self._passes(closure)
        move()
        return loss

    @torch.no_grad()
    def backward(self, closure: Closure) -> Any:
        """A step's passes without its move, in place of ``loss.backward()``.

        Every ``p.grad`` is left with what the base will see, and ``step()``, without a closure, moves. So loops and
        frameworks that clip, log or check gradients before ``step()`` do so to the combined gradient, once a step.
        WSAM's term beside the base is not among the gradients. Called again before ``step()``, it starts anew.

        Args:
            closure: as for :meth:`step`.

        Returns:
            The loss at ``w``.

        Raises:
            TypeError, ValueError: as :meth:`step`; nothing has been changed.

        Example:
            >>> loss = optimizer.backward(closure)
            >>> torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            >>> optimizer.step()
        """
        self._pending = None
        loss, self._pending = self._passes(closure)
        if self.telemetry.was_skipped:  # the gradients say so too, to whoever looks at them; step() moves nothing
            for p in (p for g in self.param_groups for p in g["params"] if p.requires_grad):
                p.grad = torch.full_like(p, torch.nan)
        return loss

    def _passes(self, closure: Closure) -> tuple[Any, Callable[[], None]]:
        """Look and see: the loss at ``w``, and the move that is left."""
        rho = self._update_rho()
        f = self._oracle(closure, rho)
        if rho.largest() == 0:
            rule: AnyRule = Plain()
        else:
            rule = self.rule
            if looks_inside(rule):
                f.batch(f"{type(self).__name__} is {rule!r}")
        if self._gradient_noise:
            f.seen.numbers["trace_V"] = gradient_statistics(f.batch("gradient_noise=True"), f.point.parameters).trace
        move = _stay
        try:
            update = rule(f)
            skip = self._check_finite and not _finite(f.seen)
        except NotFinite:
            skip = True
        if not skip:
            move = self._prepare(update, f)
        self._report(f.seen, rho, skip)
        return f.seen.numbers.get("loss", f.seen.numbers.get("full_loss")), move

    def _oracle(self, closure: Closure, rho: Rho) -> Oracle:
        groups = self.param_groups
        names = [n for g in groups for n in g["param_names"]] if "param_names" in groups[0] else None
        point = Point([p for g in groups for p in g["params"]], rho, names)

        def recall(name: str) -> Sequence[Tensor | None]:
            return [self.state[p].get(MEMORY + name) if p in self.state else None for p in point.parameters]

        return Oracle(
            closure,
            point,
            step=self._steps,
            recall=recall,
            full=self.full,
            keep_g=self._keep_g,
            parallel=self._parallel,
            guard=self._check_finite,
            modules=self._modules,
        )

    def _modules(self) -> Iterator[nn.Module]:
        """The modules that a plain closure may run; looked for once, and again where one is gone or a group is new."""
        parameters = [p for g in self.param_groups for p in g["params"]]
        known, found = self._owners
        if known != len(parameters) or any(module() is None for module in found):
            self._owners = len(parameters), [weakref.ref(module) for module in owners(parameters)]
        for reference in self._owners[1]:
            module = reference()
            if module is not None:
                yield from module.modules()

    def _update_rho(self) -> Rho:
        steps, rho = self._steps, []
        for i, g in enumerate(self.param_groups):
            g.setdefault(STEP, steps)  # a group that was added to the base
            if "rho" not in g or (callable(self._rho) and i not in self._own_rho):
                rho.append(scheduled(self._rho, steps, g))
            else:  # a number lives in the groups, like lr
                check.non_negative("rho", g["rho"])
                rho.append(g["rho"])
        for g, r in zip(self.param_groups, rho, strict=True):
            g["rho"] = r
        return Rho([r for g, r in zip(self.param_groups, rho, strict=True) for _ in g["params"]])

    def _prepare(self, update: Update, f: Oracle) -> Callable[[], None]:
        """Hand the update's gradients to the parameters; the rest is the move."""
        if update.beside is not None and any("lr" not in group for group in self.param_groups):
            raise TypeError("this method moves beside the base optimizer by lr: the base's groups must have an 'lr'")
        grads = update.grad.materialised()
        memory = {name: _apart(v.materialised(), grads) for name, v in f.seen.memory.items()}
        for p, g in zip(f.point.parameters, grads, strict=True):
            p.grad = None if g is None else g.to(getattr(p, "grad_dtype", None) or p.dtype)
        took_part = [g is not None for g in grads]
        return partial(self._move, f.point.parameters, took_part, update.beside, memory)

    def _move(
        self,
        parameters: Sequence[Tensor],
        took_part: Sequence[bool],
        beside: Vector | None,
        memory: dict[str, list[Tensor | None]],
    ) -> None:
        self.base.step()
        if beside is not None:
            self._move_beside(beside)
        for name, kept in memory.items():
            self._keep(MEMORY + name, zip(parameters, kept, took_part, strict=True))
        self._count_step()
        self.telemetry = replace(self.telemetry, steps=self._steps)

    def _move_beside(self, beside: Vector) -> None:
        """``w <- w - lr beside``, each group with its own learning rate."""
        entries = iter(beside.tensors)
        for group in self.param_groups:
            for p in group["params"]:
                s = next(entries)
                if s is not None:
                    shift_(p, s, -group["lr"] * beside.scale)

    def _keep(self, name: str, rows: Iterable[tuple[Tensor, Tensor | None, bool]]) -> None:
        for p, t, took_part in rows:
            if t is None or not took_part:  # the base has not seen p: a foreign key would keep it from initialising
                continue
            old = self.state[p].get(name)
            if old is None:
                self.state[p][name] = t.detach().to(p.dtype, copy=True)
            else:
                old.copy_(t)

    # ---- around the step

    @property
    def _steps(self) -> int:
        return int(self.param_groups[0].get(STEP, 0))

    def _count_step(self) -> None:
        for group in self.param_groups:
            group[STEP] += 1

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
        self.telemetry = Telemetry(steps=self._steps, skipped=self.telemetry.skipped)

    def _report(self, seen: Seen, rho: Rho, skip: bool) -> None:
        numbers: dict[str, Any] = dict(seen.numbers)
        full_loss = numbers.pop("full_loss", None)
        if "loss" in numbers and "loss_adv" in numbers:
            numbers["gap"] = numbers["loss_adv"] - numbers["loss"]
        numbers.setdefault("loss", full_loss)
        skipped = self.telemetry.skipped + skip
        self.telemetry = Telemetry(rho=rho.largest(), steps=self._steps, skipped=skipped, was_skipped=skip, **numbers)
        if skip:
            self._warn_once("a gradient is not finite: this step is skipped; telemetry.skipped counts")
        elif not seen.any_gradient:
            self._warn_once("no parameter received a gradient: does the closure call backward()?")

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=level_of_caller())


def _apart(kept: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``kept``, with a copy where it is the gradient itself, which the base may change in place."""
    return [t.clone() if t is not None and t is g else t for t, g in zip(kept, grads, strict=True)]


def _stay() -> None:
    """The move of a skipped step."""


def _finite(seen: Seen) -> bool:
    return not seen.norms or bool(torch.stack([n.to(seen.norms[0].device) for n in seen.norms]).isfinite().all())
