"""One step: the passes of the rule, then what is left to do when the base optimizer moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.check_batch import check_batch
from steppe.engine.checks import check_state
from steppe.engine.ddp import RankGroups
from steppe.engine.grad_scaler import Scaling
from steppe.engine.guess import Guess
from steppe.engine.memory import Memory
from steppe.engine.modules import modules_behind
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.outgrown import Outgrown
from steppe.engine.parameters import Parameters, Radii, RadiusOfGroups, names_of, parameters_of, steps_of
from steppe.engine.passes import Closure
from steppe.engine.state import PREFIX, RuleState
from steppe.engine.update import Update
from steppe.engine.vector import Vector, shift_
from steppe.engine.weights import NotFinite
from steppe.factored.engine import SharedPasses
from steppe.factored.statistics import gradient_statistics
from steppe.pieces.protocol import declared, pieces_of
from steppe.rule import Micro, Plain, rule_at
from steppe.telemetry import Telemetry
from steppe.two_calls import HalfStep, no_closure


@dataclass
class Pending:
    """A step whose gradients are in ``p.grad`` and whose move is left.

    Args:
        parameters: every parameter of the optimizer.
        beside: what moves past the base, ``w <- w - lr beside``.
        memory: by name, a vector, and the rate at which the rule's memory moves towards it (1 replaces it).
        numbers: by name, what the rule remembers in every group.
        reads: the entries of the base's state that the rule reads.
        perturbed: the parameters that the rule may perturb.
        rescaled: whether the gradients are left for a framework, whose scaler may unscale them.
        dropped: whether the gradients have been zeroed since.
    """

    parameters: Sequence[Tensor]
    beside: Vector | None = None
    memory: dict[str, tuple[Vector, float]] = field(default_factory=dict)
    numbers: dict[str, Tensor | float] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    perturbed: Sequence[Tensor] = ()
    rescaled: bool = False
    dropped: bool = False
    _handed: list[Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._handed = [p for p in self.parameters if p.grad is not None]

    @classmethod
    def of(cls, update: Update, f: Oracle, max_norm: float | None) -> Pending:
        """Average the update over the ranks, clip it, and hand its gradients to the parameters."""
        passes, parameters = f.passes, f.passes.parameters.tensors
        update, memory = passes.ranks.join(update, passes.log.memory, parameters)
        if max_norm is not None:
            passes.log.numbers["update_norm"] = update.grad.norm()
            update = update.clipped(max_norm)
        grads = update.grad.materialised()
        kept = {name: (_apart(v, grads), passes.log.rates[name]) for name, v in memory.items()}
        for p, g in zip(parameters, grads, strict=True):
            dtype = getattr(p, "grad_dtype", None) or p.dtype
            p.grad = g if g is None or g.dtype is dtype else g.to(dtype)
        numbers = {name: passes.ranks.mean_number(passes.log.kept[name]) for name in sorted(passes.log.kept)}
        movable = zip(parameters, passes.parameters.movable, strict=True)
        perturbed = [p for p, may in movable if may] if f.reads else []
        return cls(parameters, update.beside, kept, numbers, f.reads, perturbed)

    def leave_gradients(self, f: Oracle, scaler: torch.amp.GradScaler | None) -> None:
        """Scale the gradients again, for a framework whose scaler will unscale them."""
        if scaler is not None:
            for p in self.parameters:
                p.grad = None if p.grad is None else scaler.scale(p.grad)

    @property
    def waits(self) -> bool:
        """Whether the gradients are still in ``p.grad``."""
        return not self.dropped and any(p.grad is not None for p in self._handed)

    def move(self, base: torch.optim.Optimizer, state: RuleState) -> None:
        """Step the base, move beside it, and write the rule's memory.

        Parameters whose gradient was dropped after :meth:`of`, by the loop, take no step.
        """
        dropped = {id(p) for p in self._handed if p.grad is None}
        moving = [id(p) not in dropped for p in self.parameters]
        base.step()
        if self.reads:
            state.warn_of_missing(base, [p for p in self.perturbed if p.grad is not None], self.reads)
        if self.beside is not None:
            lr = {id(p): group["lr"] for group in base.param_groups for p in group["params"]}
            for p, s in zip(self.parameters, self.beside.where(moving).tensors, strict=True):
                if s is not None:
                    shift_(p, s, -lr[id(p)] * self.beside.scale)
        for name, (v, rate) in self.memory.items():
            state.keep(base, self.parameters, name, v.where(moving).tensors, rate)
        for group in base.param_groups:
            group.update({PREFIX + name: float(value) for name, value in self.numbers.items()})


def _apart(v: Vector, grads: Sequence[Tensor | None]) -> Vector:
    """Return what is to be remembered of the parameters that the base will see.

    Others get no memory: a foreign key would keep the base from initialising their state. An entry that is the
    gradient itself is copied, as the base may change it in place.
    """
    pairs = zip(v.materialised(), grads, strict=True)
    return Vector([None if t is None or g is None else t.clone() if t is g else t for t, g in pairs])


@dataclass
class Skipped:
    """A step that moves nothing, as a gradient is not finite."""

    rescaled: bool = False
    dropped: bool = False
    waits: ClassVar[bool] = False

    def leave_gradients(self, f: Oracle, scaler: torch.amp.GradScaler | None) -> None:
        """Set the gradients to NaN, so that whoever checks them skips the step too."""
        for p in f.passes.parameters.tensors:
            p.grad = torch.full_like(p, torch.nan) if p.requires_grad else None

    def move(self, base: torch.optim.Optimizer, state: RuleState) -> None:
        """Move nothing."""


@dataclass
class Stepper:
    """Makes the oracle of every step, runs the rule, and hands its update to the parameters.

    Args:
        base: the base optimizer.
        rule: the optimizer's rule.
        radius: the radius of every group.
        model, full, check_finite, cosine, gradient_noise, parallel, max_norm: as for :class:`~steppe.SharpnessAware`.
        ranks, state, scaling: find the replicas, memory and loss scale of a step.
        guess: tells of a run that has learnt nothing.
        outgrown: tells of a correction that is longer than ``g`` while the loss rises, where micro-batches are sampled.
    """

    base: torch.optim.Optimizer
    rule: AnyRule
    radius: RadiusOfGroups
    ranks: RankGroups
    model: nn.Module | None
    full: Closure | None
    check_finite: bool
    cosine: bool
    gradient_noise: bool
    parallel: bool | str
    max_norm: float | None
    state: RuleState = field(default_factory=RuleState)
    scaling: Scaling = field(default_factory=Scaling)
    guess: Guess = field(default_factory=Guess)
    outgrown: Outgrown | None = field(init=False)
    checked: bool = field(init=False)  # whether what a first batch tells of its loss has been looked at

    def __post_init__(self) -> None:
        self.state.names, self.state.numbers = declared(self.rule).remembers, declared(self.rule).numbers
        sampled = any(isinstance(piece, Micro) and piece.sampled for piece in pieces_of(self.rule))
        self.outgrown, self.checked = Outgrown() if sampled else None, False

    def oracle(self, closure: Closure, scaler: torch.amp.GradScaler | None = None) -> Oracle:
        """Return the oracle of the next step; whatever is wrong with its arguments is found here."""
        closure, scale = self.scaling.of_step(closure, scaler)
        groups = self.base.param_groups
        parameters = parameters_of(self.base)
        modules = closure.modules if isinstance(closure, Batch) else modules_behind(closure, parameters, self.model)
        ranks = self.ranks.of_step(modules, parameters)
        radii, step = self.radius.update(groups), steps_of(groups)
        self.state.clear_room(self.base)
        full = self.full
        return Oracle(
            closure,
            Parameters(parameters, radii, names_of(groups)),
            declares=declared(self._rule_at(step, radii)),
            step=step,
            memory=Memory(parameters, self.state.of(self.base), self.base.state, groups[0]),
            full=full.scaled_by(scale.scaler if scale else None) if isinstance(full, Batch) else full,
            keep_g=self.cosine,
            guard=self.check_finite or scale is not None,
            shortcuts=SharedPasses(self.parallel) if self.parallel else None,
            modules=modules,
            ranks=ranks,
            scale=scale,
        )

    def passes(self, closure: Closure, scaler: torch.amp.GradScaler | None) -> tuple[Oracle, Pending | Skipped]:
        """Run a step's passes; what is left is the move.

        Raises:
            TypeError: the rule looks at single examples and the closure is no ``Batch``, or it reads what the base
                does not keep; nothing has been changed.
        """
        f = self.oracle(closure, scaler)
        check_state(self.base, f.reads, begun=f.step > 0)
        self.checked = check_batch(f, self.rule, self.checked)
        if f.passes.ranks.unprepared:
            f.passes.prepare_static_graph()
        if self.gradient_noise:
            noise = gradient_statistics(f.batch("gradient_noise=True"), f.passes.parameters.tensors)
            f.passes.log.numbers["trace_V"] = noise.trace
        try:
            update = f.update(self._rule_at(f.step, f.rho))
        except NotFinite:
            update = None
        else:
            if f.rho.largest():
                sampled = f.passes.log.numbers.get("correction") is not None
                self.guess.see(f.step, f.passes.closure, f.passes.log.loss, sampled)
        return f, self.finish(update, f)

    def _rule_at(self, step: int, radii: Radii) -> AnyRule:
        """Return the rule of a step; without a radius it is the base optimizer's own step."""
        return rule_at(self.rule, step) if radii.largest() else Plain()

    def half_step(self, scaler: torch.amp.GradScaler | None) -> HalfStep:
        """Return the step between ``first_step`` and ``second_step``."""
        f = self.oracle(no_closure, scaler)
        return HalfStep(f, self._rule_at(f.step, f.rho))

    def second_half(self, half: HalfStep) -> Pending | Skipped:
        """End a step that ``half_step`` has begun."""
        passes = half.f.passes
        try:
            if passes.ranks.alone:  # no closure has named the replicas
                passes.ranks = self.ranks.of_step(lambda: half.ran, passes.parameters.tensors)
            return self.finish(half.see(), half.f)
        finally:
            half.leave()

    def report(self, f: Oracle, last: Telemetry, skipped: bool) -> Telemetry:
        """Return what the step has seen, with the running means of the steps before."""
        counts = {"steps": steps_of(self.base.param_groups), "skipped": last.skipped + skipped}
        seen = f.passes.log.telemetry(rho=f.rho.largest(), was_skipped=skipped, **counts).following(last)
        if self.outgrown is not None:
            self.outgrown.see(f, seen)
        return seen

    def finish(self, update: Update | None, f: Oracle) -> Pending | Skipped:
        """Hand an update whose gradients are finite on all ranks to the parameters."""
        passes = f.passes
        device = passes.parameters.device
        overflow = update is None or (f.guard and not passes.log.finite())
        skip = passes.ranks.any(overflow, device) if f.guard else overflow
        if passes.scale is not None:
            if skip and not overflow:
                passes.scale.overflow(device)
            passes.scale.end()
        if skip or update is None:
            return Skipped()
        if update.beside is not None and any("lr" not in group for group in self.base.param_groups):
            raise TypeError("this method moves beside the base optimizer by lr: the base's groups must have an 'lr'")
        return Pending.of(update, f, self.max_norm)
