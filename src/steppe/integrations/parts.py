"""A framework's update as a batch that can be cut: its own passes over the whole, and passes over parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches
from steppe.engine.nested import Data, Examples
from steppe.mean_batch import MeanBatch
from steppe.optimizer import SharpnessAware

LOGGED = ("rho", "gap", "g_norm", "eps_norm", "g_adv_norm", "passes", "skipped")  # of the telemetry
Pass = Callable[[Data, float, bool], Tensor]


class MicroBatch(MeanBatch):
    """One micro-batch of a framework's update; its parts run by the framework's forward and backward.

    Args:
        model: the framework's model, with its wrapper.
        data: the inputs of the micro-batch.
        run: ``(data, scale, first) -> loss`` runs forward and backward of ``scale`` times the mean over ``data`` and
            returns ``scale`` times the mean, detached; ``first`` tells whether these examples have not run before, so
            that metrics may count them.
        share: the share of the micro-batch in the update's loss.
        items: ``(data) -> number`` of examples, or tokens, that the mean is taken over.
        value: ``(data) -> mean``, one forward without records; ``None`` where there is no such thing.
        examples: where the examples are in the data; found, if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        run: Pass,
        share: float,
        items: Callable[[Data], float] | None = None,
        value: Callable[[Data], Tensor] | None = None,
        examples: Examples | None = None,
    ) -> None:
        super().__init__(model, _no_loss, data, weight=items)
        self._examples = examples or self._examples
        self._pass, self._value, self._fresh = run, value, False
        whole = super().weight
        self._unit = share / whole if whole else 0.0

    @property
    def weight(self) -> float:
        """The share of this part in the update's loss."""
        return self._unit * super().weight

    def value(self) -> Tensor:
        """Run one forward and return the mean loss."""
        if self._value is None:
            raise NotImplementedError("the framework's loss keeps records")
        return self._value(self.data)

    def run(
        self,
        weights: Tensor | float | None = None,
        inputs: Sequence[Tensor] | None = None,
        under: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """Run the framework's forward and backward of this part; return the mean loss, detached."""
        if isinstance(weights, Tensor):
            self.require_losses("weights on examples")
        first, self._fresh = self._fresh, False
        scale = 1.0 if weights is None else weights * self.weight
        return self._pass(self.data, scale, first) / scale

    def split(self, m: int) -> list[Batch]:
        """Return micro-batches of ``m`` examples in order, which run in place of the whole."""
        return [part.fresh() for part in super().split(m)]  # type: ignore[attr-defined]

    def fresh(self) -> Self:
        """Return this part, of which nothing has run before."""
        other = copy(self)
        other._fresh = True
        return other


class FrameworkUpdate(Batches):
    """All micro-batches of an update: a pass over the whole is the framework's own, bit for bit.

    Args:
        batches: the micro-batches.
        whole: zeroes nothing, runs forward and backward of all of them, and returns the loss.
    """

    def __init__(self, batches: Sequence[MicroBatch], whole: Callable[[], Tensor]) -> None:
        super().__init__(batches)
        self._whole = whole

    @property
    def weight(self) -> float:
        """The whole update's weight; its parts' are shares of it."""
        return 1.0

    @property
    def rounds(self) -> tuple[Batch, ...]:
        """This one: the framework goes through its micro-batches."""
        return (self,)

    def shares(self, weights: Tensor | None = None) -> Sequence[Tensor | float | None]:
        """Return ``[None]``: the framework weighs its micro-batches."""
        return [None] if weights is None else super().shares(weights)

    def run(
        self,
        weights: Tensor | float | None = None,
        inputs: Sequence[Tensor] | None = None,
        under: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """Run the framework's forward and backward of all micro-batches; return the loss."""
        if weights is not None:
            self.require_losses("weights on examples")
        return self._whole()

    def mean_of(self, seen: Sequence[Tensor]) -> Tensor:
        """Return the framework's loss."""
        return seen[0]

    def scaled_by(self, scaler: torch.amp.GradScaler | None) -> FrameworkUpdate:
        """Return this update with the framework's scaler, which the framework applies by itself."""
        other = copy(self)
        other.scaler = scaler
        return other


def seen_by(optimizer: SharpnessAware) -> dict[str, Any]:
    """Return what the last step saw, by the names under which frameworks log it."""
    seen = {f"sharpness_{name}": getattr(optimizer.telemetry, name) for name in LOGGED}
    return {name: value for name, value in seen.items() if value is not None}


def _no_loss(model: nn.Module, data: Data) -> Tensor:
    raise NotImplementedError("the framework has the loss")
