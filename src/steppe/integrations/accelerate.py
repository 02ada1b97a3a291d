"""The passes of a sharpness-aware step in place of accelerate's ``accelerator.backward(loss)``."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from steppe.batch import Batch, Batches
from steppe.engine.nested import Examples
from steppe.integrations.parts import FrameworkUpdate, MicroBatch
from steppe.optimizer import SharpnessAware
from steppe.pieces.protocol import declared

RUNS_ON = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
PLAIN = "write the loop in plain torch and call optimizer.step(closure)"
WHY = {  # steppe does not run there
    DistributedType.FSDP: "in version 1 flattens parameters, so that no rank knows the norm: set fsdp_version=2",
    DistributedType.DEEPSPEED: "keeps gradients, and from ZeRO-3 on weights, inside its engine, which has no second "
    f"backward pass at moved weights: use FSDP2, or {PLAIN}",
    DistributedType.MEGATRON_LM: f"runs forward and backward by itself: {PLAIN}",
}


class Backward:
    """The passes of a step over the micro-batches of gradient accumulation.

    ``optimizer.step()`` without a closure cannot run a second pass. ``backward(batch)`` takes the place of forward,
    loss and ``accelerator.backward(loss)``: it keeps the micro-batches, and at the last one runs all of them, once for
    each pass. ``p.grad`` is then the gradient for the base optimizer, so that clipping, logging and ``step()`` stay
    where they are. A step costs the passes of the method and the memory of its micro-batches' inputs.

    Args:
        accelerator: the accelerator; gradients are all-reduced in the last micro-batch of every pass.
        model: the prepared model.
        optimizer: a prepared steppe optimizer.
        loss: ``(model, batch) -> loss``, the mean over the micro-batch, 0-dim; or the losses of its examples, shape
            ``(n,)``, for methods that look at single examples (RW-SAM, ESAM).
        weight: ``(batch) -> number``, what a part of a micro-batch weighs under ``m=``, as for
            :class:`~steppe.MeanBatch`: the number of tokens, where the loss is a mean over tokens.

    Raises:
        TypeError: ``optimizer`` is not prepared, or no steppe optimizer.
        NotImplementedError: the accelerator runs DeepSpeed, FSDP 1, Megatron or XLA.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, steppe.SAM(base, rho=0.05), loader)
        >>> backward = Backward(accelerator, model, optimizer, lambda model, batch: model(**batch).loss)
        >>> for batch in loader:
        ...     with accelerator.accumulate(model):
        ...         loss = backward(batch)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        weight: Callable[[Any], float] | None = None,
    ) -> None:
        self.accelerator, self.model, self.loss, self.weight = accelerator, model, loss, weight
        self.optimizer = sharpness_aware(accelerator, optimizer)
        self._kept: list[Any] = []

    def __call__(self, batch: Any) -> Tensor | None:
        """Keep a micro-batch and return ``None``; at a step's last one run all passes and return the loss at ``w``.

        The loss is the sum over the micro-batches, divided by ``gradient_accumulation_steps``.
        """
        self._kept.append(batch)
        if not self.accelerator.sync_gradients:
            return None
        batches, self._kept = self._kept, []
        whole = accumulated(self.accelerator, self.model, [partial(self._pass, b) for b in batches])
        closure = self._as_batches(batches, whole) if self.optimizer.radius() else whole
        loss: Tensor = self.optimizer.backward(closure, scaler=self.accelerator.scaler, rescale=True)
        return loss

    def _as_batches(self, batches: Sequence[Any], whole: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what the rule needs: single examples, parts of the batch, or the whole alone."""
        k = self.accelerator.gradient_accumulation_steps
        needs = declared(self.optimizer.rule)
        if needs.examples:
            sizes = [Examples.of(b).n for b in batches]
            weights = [sum(sizes) / (k * n) for n in sizes]
            return Batches([self._examples(*pair) for pair in zip(batches, weights, strict=True)])
        if not needs.parts:
            return whole
        value = partial(self._mean, self.model)
        parts = [MicroBatch(self.model, b, self._part, 1 / k, items=self.weight, value=value) for b in batches]
        return FrameworkUpdate(parts, whole)

    def _examples(self, batch: Any, weight: float) -> Batch:
        return Batch(self.model, lambda model, data: self.loss(model, data) * weight, batch)

    def _mean(self, model: nn.Module, batch: Any) -> Tensor:
        loss = self.loss(model, batch)
        return loss.mean() if loss.dim() else loss

    def _pass(self, batch: Any) -> Tensor:
        loss = self._mean(self.model, batch)
        self.accelerator.backward(loss)
        return torch.div(loss.detach(), self.accelerator.gradient_accumulation_steps)

    def _part(self, batch: Any, scale: float, first: bool) -> Tensor:
        loss = self._mean(self.model, batch) * scale
        self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)  # which it divides by
        return loss.detach()


def sharpness_aware(accelerator: Accelerator, optimizer: Any) -> SharpnessAware:
    """Return the steppe optimizer inside the prepared one; raise as :class:`Backward` where there is none."""
    kind = accelerator.distributed_type
    if kind not in RUNS_ON and not getattr(accelerator, "is_fsdp2", False):
        raise NotImplementedError(
            f"with accelerate, steppe runs on one device, under DDP and under FSDP2; {kind.value} {WHY.get(kind, '')}"
        )
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
    if not isinstance(inner, SharpnessAware):
        raise TypeError(
            "optimizer must be a steppe optimizer that is prepared: "
            f"optimizer = accelerator.prepare(steppe.SAM(base)), got {optimizer!r}"
        )
    return inner


def accumulated(
    accelerator: Accelerator, model: nn.Module, passes: Sequence[Callable[[], Tensor]]
) -> Callable[[], Tensor]:
    """Return the closure over an update; each of ``passes`` runs one micro-batch and returns its share of the loss."""

    def closure() -> Tensor:
        losses = []
        for i, one in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else accelerator.no_sync(model):
                losses.append(one())
        return torch.stack(losses).sum()

    return closure
