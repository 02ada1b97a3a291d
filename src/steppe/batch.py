"""A closure that knows its examples, and gradient accumulation over several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from steppe.engine import checks
from steppe.engine.grads import modules_of, zero_grad
from steppe.engine.nested import Data, Examples
from steppe.engine.supervised import Supervised
from steppe.engine.vector import wide

Loss = Callable[[nn.Module, Data], Tensor]


class Batch:
    """A torch closure (zero, forward, backward, return the mean loss) that also knows its examples.

    Args:
        model: the module; its buffers are protected in passes away from ``w``, its gradients zeroed before each pass.
        loss: ``(model, data) -> losses``, one loss per example, shape ``(n,)``.
        data: a nested tuple, list or dict of tensors whose first dimension is the ``n`` examples. A list may hold one
            item an example instead: images of several sizes, texts, dicts of targets. ``None``, numbers and tensors of
            no dimension belong to the whole batch (:meth:`steppe.engine.nested.Examples.of`).
        scaler: the ``torch.amp.GradScaler`` of float16 training: the loss is scaled before each backward pass, and
            ``step`` unscales what it takes. Call ``scaler.update()`` after every step, and not ``scaler.step``.

    Raises:
        TypeError: ``model`` is no module, ``loss`` no function, ``scaler`` no scaler, or ``data`` holds something that
            cannot be cut into examples; the message has its path.
        ValueError: ``data`` is empty, or its entries differ in their number of examples.

    Example:
        >>> batch = Batch(model, lambda model, d: -model(d["x"]).log_prob(d["y"]), {"x": x, "y": y})
        >>> loss = optimizer.step(batch)
    """

    per_example = True  #: whether the losses of single examples are known

    def __init__(self, model: nn.Module, loss: Loss, data: Data, *, scaler: torch.amp.GradScaler | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be a function (model, data) -> losses, got {loss!r}")
        checks.grad_scaler(scaler)
        self.model, self.loss, self.data, self.scaler = model, loss, data, scaler
        self._examples = Examples.of(data)

    @classmethod
    def supervised(
        cls,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        inputs: Data,
        targets: Data,
        *,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Self:
        """Return a batch of inputs and targets; an example's loss is ``criterion(model(inputs), targets)``.

        Args:
            model: called with ``inputs``.
            criterion: a loss with ``reduction="none"``; what it returns beyond the first dimension is averaged.
            inputs, targets: what the model takes, and what the criterion compares its output with.
            scaler: as for :class:`Batch`.

        Raises:
            TypeError, ValueError: ``model`` and ``criterion`` are swapped, or ``criterion`` has another reduction.

        Example:
            >>> batch = Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), images, labels)
        """
        return cls(model, Supervised(checks.criterion_beside(model, criterion)), (inputs, targets), scaler=scaler)

    def __len__(self) -> int:
        return self._examples.n

    @property
    def weight(self) -> float:
        """The weight of this batch among others, in units of an example."""
        return len(self)

    @property
    def rounds(self) -> tuple[Batch, ...]:
        """The batches whose passes, one after the other, make one pass over this batch."""
        return (self,)

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward, and return the mean loss, a 0-dim tensor."""
        self.zero_grad()
        return self.mean_of([one.run(weights) for one, weights in zip(self.rounds, self.shares(), strict=True)])

    def run(
        self,
        weights: Tensor | float | None = None,
        inputs: Sequence[Tensor] | None = None,
        under: AbstractContextManager[Any] | None = None,
    ) -> Tensor:
        """Run forward, under a context, and backward; return what :meth:`value` has returned, detached."""
        with under or nullcontext():
            losses = self.value()
        self.backward(losses, weights, inputs)
        return losses.detach()

    def mean_of(self, seen: Sequence[Tensor]) -> Tensor:
        """Return the mean loss, from what ``run`` returned in every round."""
        return (seen[0] if len(seen) == 1 else torch.cat(list(seen))).mean()

    def zero_grad(self) -> None:
        """Drop the model's gradients."""
        zero_grad(self.model)

    def modules(self) -> list[nn.Module]:
        """Return the model's modules, each once."""
        return modules_of(self.model)

    def value(self) -> Tensor:
        """Run one forward and return what ``backward`` takes: the losses, shape ``(n,)``."""
        return self.losses()

    def losses(self) -> Tensor:
        """Run one forward and return the loss of every example, shape ``(n,)``.

        Raises:
            ValueError: the loss function returned another shape.
        """
        losses = self.loss(self.model, self.data)
        if not isinstance(losses, Tensor) or losses.shape != (len(self),):
            raise ValueError(
                'loss must return one loss per example (reduction="none"), '
                f"shape ({len(self)},), got {checks.kind(losses)}"
            )
        return losses

    def backward(
        self, losses: Tensor, weights: Tensor | float | None = None, inputs: Sequence[Tensor] | None = None
    ) -> None:
        """Run the backward of ``mean(losses)``, or of ``sum_i weights_i losses_i``; only into ``inputs``, if given."""
        if weights is None:
            total = losses.mean()
        else:
            total = (losses * (weights.to(losses) if isinstance(weights, Tensor) else weights)).sum()
        if self.scaler is not None:
            total = self.scaler.scale(total)
        total.backward(inputs=inputs)

    def loss_scale(self, like: Tensor) -> Tensor | float:
        """Return what ``backward`` multiplies the loss by, in the type of ``like`` or float32, on its device."""
        if self.scaler is None or not self.scaler.is_enabled():
            return 1.0
        return self.scaler.scale(wide(like.new_ones(())))

    def shares(self, weights: Tensor | None = None) -> Sequence[Tensor | float | None]:
        """Return the weights of the examples of every accumulated batch; ``None`` is the mean."""
        return [weights]

    def scaled_by(self, scaler: torch.amp.GradScaler | None) -> Batch:
        """Return this batch with another scaler."""
        other = copy(self)
        other.scaler = scaler
        return other

    def subset(self, on: Tensor) -> Batch:
        """Return the batch of the examples with the indices ``on``, shape ``(k,)``."""
        return self._part(on, len(on))

    def split(self, m: int) -> list[Batch]:
        """Return micro-batches of ``m`` examples in order; the last has the remaining ones."""
        return [self._part(slice(i, i + m), min(m, len(self) - i)) for i in range(0, len(self), m)]

    def require_losses(self, use: str) -> None:
        """Raise ``TypeError`` where the losses of single examples are not known."""

    def _part(self, index: slice | Tensor, n: int) -> Self:
        if n < 1:
            raise ValueError("data must hold at least one example, got 0")
        other = copy(self)
        other.data, other._examples = self._examples.cut(self.data, index), replace(self._examples, n=n)
        return other


class Batches(Batch):
    """Gradient accumulation: several batches of one model as one, ``step([batch_1, batch_2, ...])``.

    Every gradient is that of the mean over all examples, made by one forward and backward a batch, so that the memory
    of one batch is enough; the batches may differ in size and in shape. For every method the step is that of one large
    batch, except where examples of a batch influence one another (batch normalisation), as in any accumulation.

    Micro-batches do not cross from one batch into the next. So ``m=`` the size of a batch, or more, is m-SAM with a
    perturbation for every batch, which needs no second round over the earlier batches; smaller ``m`` share passes
    batch by batch.

    Args:
        batches: of one model and one scaler, at least one.

    Raises:
        TypeError: ``batches`` holds something that is no :class:`Batch`.
        ValueError: there is none, or they differ in their model or their scaler.

    Example:
        >>> optimizer.step([steppe.Batch.supervised(model, criterion, x, y) for x, y in four_batches])
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        if wrong := [type(batch).__name__ for batch in batches if not isinstance(batch, Batch)]:
            raise TypeError(f"batches must hold steppe.Batch alone, got {wrong[0]}")
        self.chunks: tuple[Batch, ...] = tuple(chunk for batch in batches for chunk in chunks_of(batch))
        if not self.chunks:
            raise ValueError("batches must hold at least one batch, got 0")
        first = self.chunks[0]
        if any(c.model is not first.model or c.scaler is not first.scaler for c in self.chunks):
            raise ValueError("batches must share one model and one scaler")
        if any(c.per_example != first.per_example for c in self.chunks):
            raise ValueError("batches must be all a Batch, or all a MeanBatch")
        self.per_example = first.per_example
        self.model, self.loss, self.scaler = first.model, first.loss, first.scaler
        self.data = [batch.data for batch in self.chunks]

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return sum(chunk.weight for chunk in self.chunks)

    @property
    def rounds(self) -> tuple[Batch, ...]:
        """The batches that are accumulated; those that weigh nothing take part under ``fully_shard`` alone."""
        weighs = tuple(chunk for chunk in self.chunks if chunk.weight)
        alike = weighs == self.chunks or not any(hasattr(module, "reshard") for module in self.modules())
        return weighs if alike else self.chunks

    def shares(self, weights: Tensor | None = None) -> Sequence[Tensor | float | None]:
        """Return the weights of the examples of every batch, shape ``(n_k,)``, or ``1 / n``."""
        if weights is None:
            return [1 / self.weight] * len(self.rounds)
        return list(torch.split(weights, [len(chunk) for chunk in self.chunks]))

    def mean_of(self, seen: Sequence[Tensor]) -> Tensor:
        """Return the mean over all examples, or the mean of the batches' means by their weights."""
        if self.per_example:
            return super().mean_of(seen)
        weights = torch.tensor([chunk.weight for chunk in self.rounds], dtype=torch.float64).to(seen[0])
        return torch.stack(list(seen)).where(weights > 0, 0.0) @ weights / weights.sum()

    def losses(self) -> Tensor:
        """Return the loss of every example, batch after batch, shape ``(n,)``."""
        return torch.cat([chunk.losses() for chunk in self.chunks])

    def require_losses(self, use: str) -> None:
        """Raise ``TypeError`` where the losses of single examples are not known."""
        self.chunks[0].require_losses(use)

    def subset(self, on: Tensor) -> Batches:
        """Return the batches of the examples ``on``, shape ``(k,)``, indexed through all batches."""
        starts = [0, *accumulate(map(len, self.chunks))]
        counts = torch.stack([((on >= a) & (on < b)).sum() for a, b in pairwise(starts)]).tolist()  # waits once
        chosen = zip(self.chunks, starts, on.sort().values.split(counts), strict=False)
        return Batches([chunk.subset(part - start) for chunk, start, part in chosen if len(part)])

    def split(self, m: int) -> list[Batch]:
        """Return micro-batches of ``m`` examples of each batch, in order."""
        return [part for chunk in self.chunks for part in chunk.split(m)]

    def scaled_by(self, scaler: torch.amp.GradScaler | None) -> Batches:
        """Return these batches with another scaler."""
        return Batches([chunk.scaled_by(scaler) for chunk in self.chunks])


def as_closure(closure: Any) -> Any:
    """Return a list of batches as one batch, and any other closure unchanged.

    Raises:
        TypeError: it is no function.
    """
    if isinstance(closure, list | tuple):
        return Batches(closure)
    if not callable(closure):
        raise TypeError(f"closure must be a function, a steppe.Batch or a list of them, got {type(closure).__name__}")
    return closure


def chunks_of(batch: Batch) -> tuple[Batch, ...]:
    """Return the batches that are accumulated; one batch is itself."""
    return batch.chunks if isinstance(batch, Batches) else (batch,)
