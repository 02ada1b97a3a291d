"""The passes of a sharpness-aware step inside Lightning's ``optimizer_step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from steppe.batch import Batch
from steppe.engine.replay import RandomState
from steppe.optimizer import SharpnessAware

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

    Raises:
        TypeError: the mixin comes after ``LightningModule``.
        NotImplementedError: the strategy is neither a single device nor DDP; ``training_step`` takes an iterator; or,
            in automatic optimisation, the method has no pass over the batch at ``w`` (n-SAM).

    Example:
        >>> class Net(SharpnessAwareMixin, LightningModule):
        ...     def training_step(self, batch, batch_idx): ...
        ...     def configure_optimizers(self):
        ...         return steppe.SAM(torch.optim.AdamW(self.parameters()), rho=0.05)
    """

    further_pass = False  #: True while ``training_step`` runs in a later pass
    _kept: _Kept | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.optimizer_step is LightningModule.optimizer_step:
            raise TypeError(f"class {cls.__name__}: SharpnessAwareMixin must come before LightningModule")

    def configure_callbacks(self) -> Any:
        """Return the module's callbacks and the one that keeps the micro-batches."""
        self._kept = _Kept()
        own = super().configure_callbacks()
        return [*(own if isinstance(own, Sequence) else [own]), self._kept]

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
        if self._kept is None or not self._kept.runs:
            raise RuntimeError("configure_callbacks must return what super().configure_callbacks() does, and more")
        runs, self._kept.runs = self._kept.runs, []
        parameters = [p for group in inner.param_groups for p in group["params"]]
        earlier = [p.grad if len(runs) > 1 else None for p in parameters]  # of the micro-batches before the last

        def first() -> Any:
            runs[-1].random = RandomState.now(runs[-1].random.devices)
            for p, g in zip(parameters, earlier, strict=True):
                p.grad = g
            earlier.clear()
            loss = optimizer_closure()
            return None if loss is None else sum((run.loss for run in runs[:-1]), loss)

        self._step(optimizer, inner, first, lambda: self._again(runs, inner))

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

    def _step(self, optimizer: Any, inner: SharpnessAware, first: Callable[[], Any], again: Callable[[], Any]) -> Any:
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
        loss = inner.backward(first if isinstance(first, Batch) else closure, scaler=scaler, rescale=True)
        if inner._pending is not None:
            inner._pending.rescaled = True  # lets Lightning clip: it refuses optimizers that unscale
        if first is not again and (loss is None or inner.full is not None):
            raise NotImplementedError(
                "in automatic optimisation the first pass over the batch must be at w, but this method has none there: "
                "use manual optimisation, self.sharpness_step(closure)"
            )
        hook = inner.register_step_pre_hook(_run_closure_first)
        try:
            optimizer.step(closure=lambda: loss)
        finally:
            hook.remove()
        return loss

    def _again(self, runs: list[_Run], optimizer: SharpnessAware) -> Tensor:
        """Run forward and backward of every micro-batch; gradients are all-reduced in the last."""
        strategy, losses = _known(self.trainer.strategy), []
        for run in runs:
            ddp = strategy if isinstance(strategy, DDPStrategy) and run is not runs[-1] else None
            run.random.restore()
            with ddp.block_backward_sync() if ddp else nullcontext():
                output: Any = strategy.training_step(*run.arguments)
                loss = output["loss"] if isinstance(output, Mapping) else output
                if not isinstance(loss, Tensor):
                    raise TypeError(f"training_step must return a loss, got {output!r}")
                loss = loss / self.trainer.accumulate_grad_batches
                strategy.backward(loss, optimizer)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

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
    random: RandomState  # before it
    loss: Tensor | float = 0.0  # at w, as Lightning weighs it


class _Kept(Callback):
    """The micro-batches since the last step."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.runs = []  # Lightning zeroes at the first batch of an epoch

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise NotImplementedError("training_step(dataloader_iter) cannot run again: take (batch, batch_idx)")
        if module.automatic_optimization:
            takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            devices = {p.device for p in module.parameters() if p.device.type != "cpu"}
            self.runs.append(_Run((batch, batch_idx) if takes_index else (batch,), RandomState.now(devices)))

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.runs and isinstance(outputs, Mapping) and "loss" in outputs:
            self.runs[-1].loss = outputs["loss"]


def _known(strategy: Any) -> SingleDeviceStrategy | DDPStrategy:
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return strategy
    raise NotImplementedError(
        f"with Lightning, steppe runs on one device or under DDP; {type(strategy).__name__} runs the backward pass or "
        'shards the weights itself: choose strategy="auto" or "ddp"'
    )


def _run_closure_first(optimizer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run Lightning's closure, which by now only calls hooks and clips; ``step()`` then moves without it."""
    if "closure" in kwargs:
        kwargs["closure"]()
    return (optimizer,), {}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value
