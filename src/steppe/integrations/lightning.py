"""The passes of a sharpness-aware step inside Lightning's ``optimizer_step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from steppe.batch import Batch
from steppe.engine.parameters import parameters_of
from steppe.engine.replay import RandomState
from steppe.integrations.lightning_closures import run_closure_first, step_without_stand_in
from steppe.integrations.parts import FrameworkUpdate, MicroBatch, seen_by
from steppe.optimizer import SharpnessAware
from steppe.pieces.protocol import declared, pieces_of
from steppe.pieces.sample import Subset
from steppe.rule import Micro

COUNTS = ("_update_count", "_computed", "_forward_cache")  # what a metric changes beside its state

if TYPE_CHECKING:
    _Module = LightningModule
else:
    _Module = object  # a mixin: the user's class brings the LightningModule


class SharpnessAwareMixin(_Module):
    """Mixin for a sharpness-aware ``LightningModule``: ``class Net(SharpnessAwareMixin, LightningModule)``.

    ``configure_optimizers`` returns a steppe optimizer, and nothing else changes. The first pass is Lightning's own,
    over all micro-batches of gradient accumulation, whose inputs are held; later passes run all of them again, log
    nothing and do not change torchmetrics. ``on_before_optimizer_step`` and gradient clipping get the gradient for the
    base optimizer, once a step; hooks around ``backward`` run in every pass.

    ``sampled=`` and ``ascent=`` run ``training_step`` on parts of the batch, which is cut along its first dimension.
    The telemetry of every step is logged as ``sharpness_gap``, ``sharpness_passes`` and so on.

    Raises:
        TypeError: the mixin comes after ``LightningModule``; or ``training_step`` returns no loss.
        NotImplementedError: the strategy is neither a single device nor DDP; ``training_step`` takes an iterator; or,
            in automatic optimisation, the method has no pass over the batch at ``w`` (n-SAM, ``m=`` without
            ``sampled=``), or looks at single examples.

    Example:
        >>> class Net(SharpnessAwareMixin, LightningModule):
        ...     def training_step(self, batch, batch_idx): ...
        ...     def configure_optimizers(self):
        ...         return steppe.SAM(torch.optim.AdamW(self.parameters()), rho=0.05)
    """

    further_pass = False  #: True while ``training_step`` runs in a later pass
    log_sharpness = True  #: whether the telemetry is logged
    part_weight: Callable[[Any], float] | None = None  #: ``(batch) -> number`` that a part weighs, or its examples
    _runs: list[_Run] | None = None  #: the micro-batches since the last step

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.optimizer_step is LightningModule.optimizer_step:
            raise TypeError(f"class {cls.__name__}: SharpnessAwareMixin must come before LightningModule")
        for name, keep in (("on_train_batch_start", SharpnessAwareMixin._begin), ("on_train_batch_end", _end)):
            if name in vars(cls):  # also where it does not call super()
                setattr(cls, name, _after(keep, vars(cls)[name]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Keep the micro-batch."""
        self._begin(batch, batch_idx)
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss of the micro-batch."""
        _end(self, outputs, batch, batch_idx)
        super().on_train_batch_end(outputs, batch, batch_idx)

    def _begin(self, batch: Any, batch_idx: int) -> None:
        if is_param_in_hook_signature(self.training_step, "dataloader_iter", explicit=True):
            raise NotImplementedError("training_step(dataloader_iter) cannot run again: take (batch, batch_idx)")
        for optimizer in self.trainer.strategy.optimizers:
            step_without_stand_in(optimizer)
        if not self.automatic_optimization:
            return
        if batch_idx == 0 or self._runs is None:  # Lightning zeroes at the first batch of an epoch
            self._runs = []
        takes_index = is_param_in_hook_signature(self.training_step, "batch_idx", min_args=2)
        devices = {p.device for p in self.parameters() if p.device.type != "cpu"}
        if not self._runs or self._runs[-1].index != batch_idx:  # a hook that calls super() comes here twice
            arguments = (batch, batch_idx) if takes_index else (batch,)
            self._runs.append(_Run(arguments, batch_idx, RandomState.now(devices)))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Run all passes, Lightning's hooks and clipping, and the base optimizer's step (automatic optimisation)."""
        inner = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if not isinstance(inner, SharpnessAware) or optimizer_closure is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        runs, self._runs = self._runs or [], []
        parameters = parameters_of(inner)
        earlier = [p.grad if len(runs) > 1 else None for p in parameters]  # of the micro-batches before the last

        def first() -> Any:
            runs[-1].random = RandomState.now(runs[-1].random.devices)
            for p, g in zip(parameters, earlier, strict=True):
                p.grad = g
            earlier.clear()
            loss = optimizer_closure()
            if loss is None:
                raise TypeError("training_step must return a loss: a sharpness-aware step cannot be left out")
            return sum((run.loss for run in runs[:-1]), loss)

        self._step(optimizer, inner, first, lambda: self._again(runs, inner), runs)

    def sharpness_step(self, closure: Callable[[], Any], optimizer: LightningOptimizer | None = None) -> Any:
        """Take a step of one of ``self.optimizers()`` and return the loss at ``w`` (manual optimisation).

        Args:
            closure: zeroes the gradients, calls ``self.manual_backward(loss)`` and returns the loss. On one device it
                may be a :class:`~steppe.Batch`, for methods that look inside the batch.
            optimizer: the optimizer to step, if there are several.

        Example:
            >>> loss = self.sharpness_step(closure)  # in training_step
        """
        chosen = self.optimizers() if optimizer is None else optimizer
        inner = getattr(chosen, "optimizer", None)
        if not isinstance(inner, SharpnessAware):
            raise TypeError(f"optimizer must be one of self.optimizers() that is steppe's, got {chosen!r}")
        return self._step(chosen, inner, closure, closure)

    def _step(
        self,
        optimizer: Any,
        inner: SharpnessAware,
        first: Callable[[], Any],
        again: Callable[[], Any],
        runs: list[_Run] | None = None,
    ) -> Any:
        """Take a step with ``first`` as its first pass and ``again`` as every later one; return the loss at ``w``."""
        strategy, pending = _known(self.trainer.strategy), [first]

        def closure() -> Any:
            if pending:
                return pending.pop()()
            with self._without_traces():
                return again()

        vars(closure)["model"] = strategy.model  # under DDP the replica, which this module does not know
        if isinstance(first, Batch) and isinstance(strategy, DDPStrategy):
            raise TypeError("closure must be a function under DDP: a steppe.Batch's backward pass is not Lightning's")
        scaler = getattr(strategy.precision_plugin, "scaler", None)
        passes: Any = first if isinstance(first, Batch) else closure
        if runs is not None and inner.radius():
            passes = self._update(runs, inner, closure)
        loss = inner.backward(passes, scaler=scaler, rescale=True)
        hook = inner.register_step_pre_hook(run_closure_first)
        try:
            optimizer.step(closure=lambda: loss)
        finally:
            hook.remove()
        self._log_telemetry(inner)
        return loss

    def _log_telemetry(self, optimizer: SharpnessAware) -> None:
        """Log the telemetry of the step; of one of several optimizers, with its number."""
        every = [getattr(o, "optimizer", o) for o in self.trainer.strategy.optimizers]
        which = f"_{every.index(optimizer)}" if len(every) > 1 else ""
        for name, value in seen_by(optimizer).items() if self.log_sharpness else ():
            super().log(f"{name}{which}", value, on_step=True, on_epoch=False)

    def _update(self, runs: list[_Run], optimizer: SharpnessAware, whole: Callable[[], Any]) -> Callable[[], Any]:
        """Return the closure, or where the rule takes parts of the batch, the batch that can be cut.

        Lightning's own pass logs and is at ``w``. With ``ascent=`` it is the pass at ``w + eps``.
        """
        needs, pieces = declared(optimizer.rule), list(pieces_of(optimizer.rule))
        serial = any(isinstance(piece, Micro) and piece.sampled is None for piece in pieces)
        if serial or needs.examples or optimizer.full is not None:
            raise NotImplementedError(
                "in automatic optimisation Lightning's own pass over the batch must be at w, and this method has none "
                "there, or looks at single examples: use manual optimisation, self.sharpness_step(closure), where the "
                "closure may be a steppe.Batch" + ("; or sampled=" if serial else "")
            )
        if not needs.parts:
            return whole
        if self.trainer.accumulate_grad_batches > 1 and any(isinstance(piece, Subset) for piece in pieces):
            raise NotImplementedError(
                "ascent= takes its only pass over the batch at w + eps, and Lightning runs the earlier micro-batches "
                "of accumulate_grad_batches at w: use sampled=, or manual optimisation, self.sharpness_step(batches)"
            )
        model, share = _known(self.trainer.strategy).model or self, 1 / self.trainer.accumulate_grad_batches
        return FrameworkUpdate(
            [
                MicroBatch(model, run.arguments[0], self._part_of(run, optimizer), share, items=self.part_weight)
                for run in runs
            ],
            whole,
        )

    def _again(self, runs: list[_Run], optimizer: SharpnessAware) -> Tensor:
        """Run forward and backward of every micro-batch; gradients are all-reduced in the last."""
        strategy, losses = _known(self.trainer.strategy), []
        for run in runs:
            ddp = strategy if isinstance(strategy, DDPStrategy) and run is not runs[-1] else None
            run.random.restore()
            with ddp.block_backward_sync() if ddp else nullcontext():
                loss = _loss(strategy.training_step(*run.arguments)) / self.trainer.accumulate_grad_batches
                strategy.backward(loss, optimizer)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _part_of(self, run: _Run, optimizer: SharpnessAware) -> Callable[[Any, float, bool], Tensor]:
        """Return what runs forward and backward of a part of a micro-batch, without traces."""

        def part(data: Any, scale: float, first: bool) -> Tensor:
            strategy = _known(self.trainer.strategy)
            with self._without_traces():
                loss = _loss(strategy.training_step(data, *run.arguments[1:])) * scale
                strategy.backward(loss, optimizer)
            return loss.detach()

        return part

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log in the first pass only."""
        if not self.further_pass:
            super().log(*args, **kwargs)

    @contextmanager
    def _without_traces(self) -> Iterator[None]:
        metrics = [m for m in self.modules() if isinstance(m, Metric)]
        before = [{k: _copy(vars(m)[k]) for k in {*m.metric_state, *COUNTS} & vars(m).keys()} for m in metrics]
        self.further_pass = True
        try:
            yield
        finally:
            self.further_pass = False
            for metric, state in zip(metrics, before, strict=True):
                metric.__dict__.update(state)


@dataclass
class _Run:
    arguments: tuple[Any, ...]
    index: int
    random: RandomState  # before it
    loss: Tensor | float = 0.0  # at w, as Lightning weighs it


def _end(module: SharpnessAwareMixin, outputs: Any, batch: Any, batch_idx: int) -> None:
    """Keep the loss of the micro-batch, as Lightning weighs it."""
    if module._runs and isinstance(outputs, Mapping) and "loss" in outputs:
        module._runs[-1].loss = outputs["loss"]


def _after(keep: Callable[..., None], hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def both(self: Any, *args: Any) -> Any:
        keep(self, *args)
        return hook(self, *args)

    return both


def _loss(output: Any) -> Tensor:
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"training_step must return a loss, got {output!r}")
    return loss


def _known(strategy: Any) -> SingleDeviceStrategy | DDPStrategy:
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return strategy
    raise NotImplementedError(
        f"with Lightning, steppe runs on one device or under DDP; {type(strategy).__name__} runs the backward pass or "
        'shards the weights itself: choose strategy="auto" or "ddp"'
    )


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
