"""What the last step saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steppe.engine.vector import TINY, Vector

RATE = 0.02  # of running means: they follow about the last 50 steps


@dataclass(frozen=True)
class Telemetry:
    """Numbers of the last step; tensors stay on their device until they are read.

    Under micro-batches they are means over the parts, weighted by size. ``None`` is what the step did not see: a base
    step has no perturbation, and the cosine needs ``g``, which SAM frees to save a copy of the parameters
    (``cosine=True`` keeps it; methods that use ``g`` have it anyway).

    Attributes:
        rho: the largest radius of any group.
        loss: ``L(w)``, on the batch (n-SAM: on the full batch; ``ascent=m``: on the ``m`` examples, unless the method
            takes the batch's gradient at ``w`` too; MomentumSAM: ``L(w + eps)``, it has no pass at ``w``).
        loss_adv: ``L(w + eps)``, on the whole batch.
        gap: the surrogate gap ``L(w + eps) - L(w)``, where one batch answered both.
        g_norm: Euclidean norm of the gradient at ``w`` (RW-SAM: of the weighted gradient; ESAM: of the kept tensors';
            micro-batches that share passes: of the perturbed parameters'; ``ascent=m``: as ``loss``).
        eps_norm: Euclidean norm of ``eps`` before it is rounded to the parameters' type.
        g_adv_norm: Euclidean norm of the gradient at ``w + eps``.
        update_norm: Euclidean norm of the gradient that the base sees, before it is clipped (``max_norm=``).
        cosine: of ``g`` and ``g_adv``; ``None`` with ``ascent=``, unless the method takes the batch's ``g``.
        correction: of ``sampled=``: ``norm(u - g) / norm(g)``, the sampled correction and what moves beside the base
            together, after ``clip=``; under DDP on this rank.
        correction_mean: running mean of ``correction`` over about the last 50 steps that have one.
        correction_deviation: its running standard deviation.
        trace_V: trace of the covariance of the examples' gradients at ``w`` in this batch (``gradient_noise=True``).
        forwards: forward passes over the batch.
        backwards: backward passes over the batch.
        steps: steps so far, as checkpointed; skipped ones do not count.
        skipped: steps skipped for gradients that were not finite, since the optimizer was made.
        was_skipped: whether the last step was.
    """

    rho: float = 0.0
    loss: Tensor | float | None = None
    loss_adv: Tensor | float | None = None
    gap: Tensor | float | None = None
    g_norm: Tensor | float | None = None
    eps_norm: Tensor | float | None = None
    g_adv_norm: Tensor | float | None = None
    update_norm: Tensor | float | None = None
    cosine: Tensor | float | None = None
    correction: Tensor | float | None = None
    correction_mean: Tensor | float | None = None
    correction_deviation: Tensor | float | None = None
    trace_V: Tensor | float | None = None
    forwards: float = 0.0
    backwards: float = 0.0
    steps: int = 0
    skipped: int = 0
    was_skipped: bool = False

    @property
    def passes(self) -> float:
        """The step's cost in ordinary forward-backward passes, a backward counted as two forwards."""
        return (self.forwards + 2 * self.backwards) / 3

    def following(self, last: Telemetry) -> Telemetry:
        """Return these numbers with the running mean and deviation, of which ``last`` has those before this step."""
        mean, deviation, x = last.correction_mean, last.correction_deviation, self.correction
        if x is not None and not self.was_skipped:
            if mean is None or deviation is None:
                mean, deviation = x, 0.0
            step = x - mean
            mean, deviation = mean + RATE * step, ((1 - RATE) * (deviation**2 + RATE * step**2)) ** 0.5
        return replace(self, correction_mean=mean, correction_deviation=deviation)


@dataclass
class StepLog:
    """What one step saw: tensors are left on their device, so that reading them is the only cost.

    Over micro-batches, every number is the mean over the parts, weighted by their size.
    """

    numbers: dict[str, Tensor | float] = field(default_factory=dict)
    norms: list[Tensor] = field(default_factory=list)  # of every gradient taken: are they finite?
    memory: dict[str, Vector] = field(default_factory=dict)
    kept: dict[str, Tensor | float] = field(default_factory=dict)  # numbers for the next step
    rates: dict[str, float] = field(default_factory=dict)  # at which what is remembered moves towards it
    any_gradient: bool = False

    def add(self, share: float, other: StepLog, first: bool = False) -> None:
        """Merge what a part of the batch saw; the means of the parts replace what a pass over the whole saw before."""
        for name in other.numbers if first else ():
            if name not in ("forwards", "backwards"):
                self.numbers.pop(name, None)
        for name, value in other.numbers.items():
            self.numbers[name] = self.numbers.get(name, 0.0) + share * value
        for name, vector in other.memory.items():
            self.memory[name] = self.memory[name] + share * vector if name in self.memory else share * vector
        for name, value in other.kept.items():
            self.kept[name] = self.kept.get(name, 0.0) + share * value
        self.rates |= other.rates
        self.norms += other.norms
        self.any_gradient |= other.any_gradient

    def count(self, name: str, share: Tensor | float = 1.0) -> None:
        """Count a pass of the kind ``name`` over this share of the batch."""
        self.numbers[name] = self.numbers.get(name, 0.0) + share

    def add_sample(self, share: float, cost: float, other: StepLog) -> None:
        """Merge what a sampled part saw, beside the whole batch's pass; ``cost`` is its size in batches."""
        numbers = dict(other.numbers)
        if "loss" in numbers and "loss_adv" in numbers:
            numbers["gap"] = numbers.pop("loss_adv") - numbers.pop("loss")
        for name in ("forwards", "backwards"):
            self.count(name, cost * numbers.pop(name, 0.0))
        kept = {name: value for name, value in numbers.items() if name not in ("loss", "g_norm")}
        self.add(share, replace(other, numbers=kept))

    def add_other(self, other: StepLog, cost: float = 1.0) -> None:
        """Merge the log of a perturbation's pass over other examples than the batch, which costs ``cost`` passes."""
        for name in ("forwards", "backwards"):
            self.count(name, cost * other.numbers.get(name, 0.0))
        if "g_norm" in other.numbers:
            self.numbers.setdefault("g_norm", other.numbers["g_norm"])
        if "loss" in other.numbers:
            self.numbers["other_loss"] = other.numbers["loss"]
        self.memory |= other.memory
        self.rates |= other.rates
        self.norms += other.norms
        self.any_gradient |= other.any_gradient

    def compare(self, g: Vector | None, g_adv: Vector) -> None:
        """Log the cosine of ``g`` and ``g_adv``, where ``g`` is held."""
        if g is not None:
            self.numbers["cosine"] = g.dot(g_adv) / (g.norm() * g_adv.norm() + TINY)

    def finite(self) -> bool:
        """Tell whether every gradient of the step is finite; waits for the device, once."""
        device = self.norms[0].device if self.norms else None
        return not self.norms or bool(torch.stack([n.to(device) for n in self.norms]).isfinite().all())

    @property
    def loss(self) -> Tensor | float | None:
        """``L(w)``; of n-SAM on the larger batch, of a perturbation from a subset on that; else ``L(w + eps)``."""
        return next((self.numbers[name] for name in ("loss", "other_loss", "loss_adv") if name in self.numbers), None)

    def telemetry(self, **of_the_step: Any) -> Telemetry:
        """Return the numbers as the user sees them."""
        numbers: dict[str, Any] = {name: value for name, value in self.numbers.items() if name != "other_loss"}
        if "loss" in numbers and "loss_adv" in numbers:
            numbers["gap"] = numbers["loss_adv"] - numbers["loss"]
        return Telemetry(**numbers | {"loss": self.loss} | of_the_step)
