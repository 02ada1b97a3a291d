"""A closure that knows its examples, and gradient accumulation over several of them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn

from steppe.engine import checks
from steppe.engine.vector import wide

Data = Any  # a nested tuple, list or dict of tensors with a common first dimension
Loss = Callable[[nn.Module, Data], Tensor]


class Batch:
    """A torch closure (zero, forward, backward, return the mean loss) that also knows its examples.

    Args:
        model: the module; its buffers are protected in passes away from ``w``, its gradients zeroed before each pass.
        loss: ``(model, data) -> losses``, one loss per example, shape ``(n,)``.
        data: a nested tuple, list or dict of tensors whose first dimension is the ``n`` examples; ``None`` may stand
            where there is none.
        scaler: the ``torch.amp.GradScaler`` of float16 training: the loss is scaled before each backward pass, and
            ``step`` unscales what it takes. Call ``scaler.update()`` after every step, and not ``scaler.step``.

    Raises:
        TypeError: ``model`` is no module, ``loss`` no function, ``scaler`` no scaler, or ``data`` holds something that
            is not a tensor.
        ValueError: ``data`` is empty, or its tensors differ in their first dimension.

    Example:
        >>> batch = Batch(model, lambda model, d: -model(d["x"]).log_prob(d["y"]), {"x": x, "y": y})
        >>> loss = optimizer.step(batch)
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data, *, scaler: torch.amp.GradScaler | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be a function (model, data) -> losses, got {loss!r}")
        checks.grad_scaler(scaler)
        self.model, self.loss, self.data, self.scaler = model, loss, data, scaler
        self._n = _count(data)

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
            inputs: what the model takes.
            targets: what the criterion compares its output with.
            scaler: as for :class:`Batch`.

        Raises:
            ValueError: ``criterion`` has another reduction.

        Example:
            >>> batch = Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), images, labels)
        """
        if getattr(criterion, "reduction", "none") != "none":
            raise ValueError(f'criterion must have reduction="none", got {criterion.reduction!r}')  # type: ignore[attr-defined]
        return cls(model, _Supervised(criterion), (inputs, targets), scaler=scaler)

    def __len__(self) -> int:
        return self._n

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward, and return the mean loss, a 0-dim tensor."""
        self.zero_grad()
        losses = self.losses()
        self.backward(losses)
        return losses.detach().mean()

    def zero_grad(self) -> None:
        """Drop the model's gradients."""
        if getattr(self.model.zero_grad, "__func__", None) is not nn.Module.zero_grad:  # the model's own
            self.model.zero_grad(set_to_none=True)
            return
        for module in self.modules():
            for p in module._parameters.values():
                if p is not None:
                    p.grad = None

    def modules(self) -> list[nn.Module]:
        """Return the model's modules, each once; faster than ``nn.Module.modules``, which builds names."""
        found, seen = [self.model], {id(self.model)}
        for module in found:
            for inner in module._modules.values() if module._modules else ():
                if inner is not None and id(inner) not in seen:
                    seen.add(id(inner))
                    found.append(inner)
        return found

    def losses(self) -> Tensor:
        """Run one forward and return the loss of every example, shape ``(n,)``.

        Raises:
            ValueError: the loss function returned another shape.
        """
        losses = self.loss(self.model, self.data)
        if not isinstance(losses, Tensor) or losses.shape != (len(self),):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f'loss must return one loss per example (reduction="none"), shape ({len(self)},), got {got}'
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
        return self._with(mapped(lambda t: t[on.to(t.device)], self.data))

    def split(self, m: int) -> list[Batch]:
        """Return micro-batches of ``m`` examples in order; the last has the remaining ones."""
        parts = [slice(i, i + m) for i in range(0, len(self), m)]
        return [self._with(mapped(lambda t, s=s: t[s], self.data)) for s in parts]  # type: ignore[misc]

    def _with(self, data: Data) -> Self:
        other = copy(self)
        other.data, other._n = data, _count(data)
        return other


class Batches(Batch):
    """Gradient accumulation: several batches of one model as one, ``step([batch_1, batch_2, ...])``.

    Every gradient is that of the mean over all examples, made by one forward and backward a batch, so that the memory
    of one batch is enough; the batches may differ in size and in shape. For every method the step is that of one large
    batch, except where examples of a batch influence one another (batch normalisation), as in any accumulation.

    Micro-batches do not cross from one batch into the next. So ``m=`` the size of a batch, or more, is m-SAM with a
    perturbation for every batch, which needs no second round over the earlier batches; smaller ``m`` share passes
    batch by batch.

    Raises:
        TypeError: ``batches`` holds something that is no :class:`Batch`.
        ValueError: there is none, or they differ in their model or their scaler.

    Example:
        >>> optimizer.step([steppe.Batch.supervised(model, criterion, x, y) for x, y in four_batches])
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            if not isinstance(batch, Batch):
                raise TypeError(f"batches must hold steppe.Batch alone, got {type(batch).__name__}")
        self.chunks: tuple[Batch, ...] = tuple(chunk for batch in batches for chunk in chunks_of(batch))
        if not self.chunks:
            raise ValueError("batches must hold at least one batch, got 0")
        first = self.chunks[0]
        if any(c.model is not first.model or c.scaler is not first.scaler for c in self.chunks):
            raise ValueError("batches must share one model and one scaler")
        self.model, self.loss, self.scaler = first.model, first.loss, first.scaler
        self.data = [batch.data for batch in self.chunks]
        self._n = sum(map(len, self.chunks))

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward of every batch, and return the mean loss, a 0-dim tensor."""
        self.zero_grad()
        losses = []
        for chunk, weights in zip(self.chunks, self.shares(), strict=True):
            losses.append(chunk.losses())
            chunk.backward(losses[-1], weights)
            losses[-1] = losses[-1].detach()
        return torch.cat(losses).mean()

    def shares(self, weights: Tensor | None = None) -> Sequence[Tensor | float | None]:
        """Return the weights of the examples of every batch, shape ``(n_k,)``; by default ``1 / n``."""
        if weights is None:
            return [1 / len(self)] * len(self.chunks)
        return list(torch.split(weights, [len(chunk) for chunk in self.chunks]))

    def losses(self) -> Tensor:
        """Return the loss of every example, batch after batch, shape ``(n,)``."""
        return torch.cat([chunk.losses() for chunk in self.chunks])

    def subset(self, on: Tensor) -> Batches:
        """Return the batches of the examples ``on``, shape ``(k,)``, indexed through all batches."""
        starts = [0]
        for chunk in self.chunks:
            starts.append(starts[-1] + len(chunk))
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


@dataclass(frozen=True)
class _Supervised:
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, model: nn.Module, data: Data) -> Tensor:
        inputs, targets = data
        losses = self.criterion(model(inputs), targets)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def mapped(f: Callable[[Tensor], Tensor], data: Data) -> Data:
    """Return nested data with ``f`` of every tensor."""
    if isinstance(data, Tensor):
        return f(data)
    if data is None:
        return None
    if isinstance(data, MutableMapping):  # of any kind, kept
        other = copy(data)
        other.update({key: mapped(f, value) for key, value in data.items()})
        return other
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(mapped(f, value) for value in data))
    if isinstance(data, tuple | list):
        return type(data)(mapped(f, value) for value in data)
    raise TypeError(f"data must be a nested tuple, list or dict of tensors, found {type(data).__name__}")


def leaves(data: Data) -> list[Tensor]:
    """Return the tensors of nested data, in order."""
    found: list[Tensor] = []
    mapped(lambda t: found.append(t) or t, data)  # type: ignore[func-returns-value]
    return found


def _count(data: Data) -> int:
    shapes = [t.shape for t in leaves(data)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            "data must hold tensors with a common first dimension, one row an example, "
            f"got shapes {[tuple(shape) for shape in shapes]}"
        )
    if shapes[0][0] == 0:
        raise ValueError("data must hold at least one example, got 0")
    return shapes[0][0]
