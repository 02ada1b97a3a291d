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

from steppe.optimizer import SharpnessAware

RUNS_ON = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


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
        loss: ``(model, batch) -> loss``, the mean over the micro-batch, 0-dim.

    Raises:
        TypeError: ``optimizer`` is not prepared, or no steppe optimizer.
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
        """Keep a micro-batch and return ``None``; at a step's last one run all passes and return the loss at ``w``.

        The loss is the sum over the micro-batches, divided by ``gradient_accumulation_steps``.
        """
        self._kept.append(batch)
        if not self.accelerator.sync_gradients:
            return None
        batches, self._kept = self._kept, []
        return backward(self.accelerator, self.model, self.optimizer, [partial(self._pass, b) for b in batches])

    def _pass(self, batch: Any) -> Tensor:
        loss = self.loss(self.model, batch)
        self.accelerator.backward(loss)
        return torch.div(loss.detach(), self.accelerator.gradient_accumulation_steps)


def sharpness_aware(accelerator: Accelerator, optimizer: Any) -> SharpnessAware:
    """Return the steppe optimizer inside the prepared one; raise as :class:`Backward` where there is none."""
    if accelerator.distributed_type not in RUNS_ON:
        raise NotImplementedError(
            "with accelerate, steppe runs on one device or under DDP; "
            f"{accelerator.distributed_type.value} runs the backward pass or shards the weights itself: "
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
) -> Tensor:
    """Run ``optimizer.backward``; each of ``passes`` runs one micro-batch and returns its share of the loss."""

    def closure() -> Tensor:
        losses = []
        for i, one in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else accelerator.no_sync(model):
                losses.append(one())
        return torch.stack(losses).sum()

    loss: Tensor = optimizer.backward(closure, scaler=accelerator.scaler, rescale=True)
    return loss
