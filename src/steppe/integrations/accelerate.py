"""accelerate: both passes in place of ``accelerator.backward(loss)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn

from steppe.optimizer import SharpnessAware

RUNS_ON = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Backward:
    """The passes of a step over the micro-batches that ``accelerator.accumulate`` gathers.

    ``optimizer.step()`` without a closure cannot run a second pass. ``backward(batch)`` takes the place of forward,
    loss and ``accelerator.backward(loss)``: it keeps the micro-batches, and at the last one runs all of them, as often
    as the method needs. ``p.grad`` is then what the base optimizer will see, so that clipping, logging and ``step()``
    stay where they are. A step costs the passes of the method and the memory of its micro-batches' inputs.

    Args:
        accelerator: prepares and scales; gradients are synchronised in the last micro-batch of every pass.
        model: as prepared.
        optimizer: a steppe optimizer, as prepared.
        loss: ``(model, batch) -> loss``, the mean over the micro-batch, 0-dim.

    Raises:
        TypeError: ``optimizer`` is not prepared, or is not steppe's.
        NotImplementedError: the accelerator runs DeepSpeed, FSDP, Megatron or XLA.

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
    ) -> None:
        self.accelerator, self.model, self.loss = accelerator, model, loss
        self.optimizer = sharpness_aware(accelerator, optimizer)
        self._kept: list[Any] = []

    def __call__(self, batch: Any) -> Tensor | None:
        """``None`` while micro-batches are gathered; at the last, the loss at ``w`` as accelerate weighs it.

        That is the sum over the micro-batches, divided by ``gradient_accumulation_steps``.
        """
        self._kept.append(batch)
        if not self.accelerator.sync_gradients:
            return None
        batches, self._kept = self._kept, []
        passes = [lambda batch=batch: self._pass(batch) for batch in batches]
        loss: Tensor = backward(self.accelerator, self.model, self.optimizer, passes)
        return loss

    def _pass(self, batch: Any) -> Tensor:
        loss = self.loss(self.model, batch)
        self.accelerator.backward(loss)
        share: int = self.accelerator.gradient_accumulation_steps
        return loss.detach() / share


def sharpness_aware(accelerator: Accelerator, optimizer: Any) -> SharpnessAware:
    """The steppe optimizer inside the prepared one, where this accelerator can run both passes."""
    if accelerator.distributed_type not in RUNS_ON:
        raise NotImplementedError(
            "with accelerate, steppe runs on one device or under DDP; "
            f"{accelerator.distributed_type.value} runs the backward pass or shards the weights by itself: "
            "write the loop in plain torch and call optimizer.step(closure)"
        )
    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else None
    if not isinstance(inner, SharpnessAware):
        raise TypeError(
            "optimizer must be a steppe optimizer that is prepared: "
            f"optimizer = accelerator.prepare(steppe.SAM(base)), got {optimizer!r}"
        )
    return inner


def backward(
    accelerator: Accelerator, model: nn.Module, optimizer: SharpnessAware, passes: Sequence[Callable[[], Tensor]]
) -> Any:
    """``optimizer.backward`` over micro-batches: ``passes`` each run forward and backward and return their share."""

    def closure() -> Tensor:
        losses = []
        for i, one in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else accelerator.no_sync(model):
                losses.append(one())
        return torch.stack(losses).sum()

    return optimizer.backward(closure, scaler=accelerator.scaler, rescale=True)
