"""Gradients at the model's outputs, of batches whose loss is split into model and criterion."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches, Loss, chunks_of
from steppe.engine.nested import Data
from steppe.engine.parameters import Parameters
from steppe.engine.supervised import Supervised
from steppe.engine.vector import wide


def recording(batch: Batch, outputs: list[Tensor], parameters: Parameters) -> Batch:
    """Return the batch whose forwards append the model's output, detached, to ``outputs``.

    Raises:
        TypeError: its loss is not split into model and criterion, or the criterion is a module that holds parameters of
            the optimizer.
    """
    if not all(isinstance(part.loss, Supervised) for part in chunks_of(batch)):
        raise TypeError(
            "this method needs the model's outputs: make the batch by steppe.Batch.supervised(model, criterion, "
            "inputs, targets), whose loss is split into model and criterion"
        )
    for part in chunks_of(batch):
        criterion = part.loss.criterion  # type: ignore[attr-defined]
        held = set(map(id, criterion.parameters())) if isinstance(criterion, nn.Module) else ()
        for i in _trained(parameters):
            if id(parameters.tensors[i]) in held:
                raise TypeError(_trained_in(part.loss, i, parameters))
    return _with_losses(batch, [partial(_recorded, part.loss, outputs) for part in chunks_of(batch)])


def at_outputs(batch: Batch, outputs: Sequence[Tensor], parameters: Parameters) -> list[Tensor]:
    """Return the gradient of every example's loss by the model's output, batch after batch.

    Raises:
        TypeError: the criterion uses parameters of the optimizer, of which these gradients know nothing. Of a function
            that is known only now.
    """
    found: list[Tensor] = []
    trained = _trained(parameters)
    for part, output in zip(chunks_of(batch), outputs, strict=True):
        with torch.enable_grad():
            y = output.detach().requires_grad_()
            losses = part.loss(lambda _, y=y: y, part.data)  # type: ignore[arg-type]
            inputs = [y, *(parameters.tensors[i] for i in trained)]
            v, *by_parameter = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        for i, g in zip(trained, by_parameter, strict=True):
            if g is not None:
                raise TypeError(_trained_in(part.loss, i, parameters))
        found.append(torch.zeros_like(y) if v is None else v)
    return found


def _trained(parameters: Parameters) -> list[int]:
    return [i for i, p in enumerate(parameters.tensors) if p.requires_grad]


def _trained_in(loss: Loss, i: int, parameters: Parameters) -> str:
    criterion = loss.criterion  # type: ignore[attr-defined]
    kind = type(criterion).__name__ if isinstance(criterion, nn.Module) else repr(criterion)
    name = "" if parameters.names is None else f"{parameters.names[i]!r} "
    return (
        f"criterion must use no parameter that the optimizer trains, as this method differentiates the loss by the "
        f"model's outputs alone, got {kind} with the parameter {name}of shape {tuple(parameters.tensors[i].shape)}: "
        "leave it out of the optimizer, or make it part of the model"
    )


def holding(batch: Batch, v: Sequence[Tensor]) -> Batch:
    """Return the batch whose losses have the values of the batch's, and the gradients of ``<v_i, F_i>``."""
    return _with_losses(batch, [partial(_held, part.loss, v_k) for part, v_k in zip(chunks_of(batch), v, strict=True)])


def _with_losses(batch: Batch, losses: Sequence[Loss]) -> Batch:
    chunks = []
    for part, loss in zip(chunks_of(batch), losses, strict=True):
        chunks.append(copy(part))
        chunks[-1].loss = loss
    return Batches(chunks) if isinstance(batch, Batches) else chunks[0]


def _recorded(loss: Loss, outputs: list[Tensor], model: nn.Module, data: Data) -> Tensor:
    return loss(_listening(model, lambda y: outputs.append(y.detach())), data)  # type: ignore[arg-type]


def _held(loss: Loss, v: Tensor, model: nn.Module, data: Data) -> Tensor:
    outputs: list[Tensor] = []
    losses = loss(_listening(model, outputs.append), data).detach()  # type: ignore[arg-type]
    linear = (wide(outputs[0]) * v).flatten(1).sum(1) if v.dim() > 1 else wide(outputs[0]) * v
    return losses + (linear - linear.detach())


def _listening(model: nn.Module, hear: Callable[[Tensor], None]) -> Callable[[Any], Tensor]:
    """Return the model as a function that tells its output."""

    def run(inputs: Any) -> Tensor:
        y = model(inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"this method needs a model whose output is one tensor, got {type(y).__name__}")
        hear(y)
        return y

    return run
