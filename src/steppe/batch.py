"""A closure that knows its examples."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

Data = Any  # a nested tuple, list or dict of tensors with a common first dimension
Loss = Callable[[nn.Module, Data], Tensor]


class Batch:
    """A torch closure (zero, forward, backward, return the mean loss) that also knows its examples.

    Args:
        model: the module; its buffers are protected in passes away from ``w``, its gradients zeroed before each pass.
        loss: ``(model, data) -> losses``, one loss per example, shape ``(n,)``.
        data: a nested tuple, list or dict of tensors whose first dimension is the ``n`` examples; ``None`` may stand
            where there is none.

    Raises:
        TypeError: ``model`` is no module, ``loss`` no function, or ``data`` holds something that is not a tensor.
        ValueError: ``data`` is empty, or its tensors differ in their first dimension.

    Example:
        >>> batch = Batch(model, lambda model, d: -model(d["x"]).log_prob(d["y"]), {"x": x, "y": y})
        >>> loss = optimizer.step(batch)
    """

    def __init__(self, model: nn.Module, loss: Loss, data: Data) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"loss must be a function (model, data) -> losses, got {loss!r}")
        self.model, self.loss, self.data = model, loss, data
        self._n = _count(data)

    @classmethod
    def supervised(cls, model: nn.Module, criterion: Callable[[Any, Any], Tensor], inputs: Data, targets: Data) -> Self:
        """A batch of inputs and targets: the loss of an example is ``criterion(model(inputs), targets)``.

        Args:
            model: called with ``inputs``.
            criterion: a loss with ``reduction="none"``; what it returns beyond the first dimension is averaged.
            inputs: what the model takes.
            targets: what the criterion compares its output with.

        Raises:
            ValueError: ``criterion`` has another reduction.

        Example:
            >>> batch = Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), images, labels)
        """
        if getattr(criterion, "reduction", "none") != "none":
            raise ValueError(f'criterion must have reduction="none", got {criterion.reduction!r}')  # type: ignore[attr-defined]
        return cls(model, _Supervised(criterion), (inputs, targets))

    def __len__(self) -> int:
        return self._n

    def __call__(self) -> Tensor:
        """Zero, forward, backward; the mean loss, a 0-dim tensor."""
        self.zero_grad()
        losses = self.losses()
        self.backward(losses)
        return losses.detach().mean()

    def zero_grad(self) -> None:
        """Drop the model's gradients."""
        self.model.zero_grad(set_to_none=True)

    def losses(self) -> Tensor:
        """One forward: the loss of every example, shape ``(n,)``.

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

    def backward(self, losses: Tensor, weights: Tensor | None = None, inputs: Sequence[Tensor] | None = None) -> None:
        """Backward of ``mean(losses)``, or of ``sum_i weights_i losses_i``; only into ``inputs``, if given."""
        total = losses.mean() if weights is None else (losses * weights.to(losses)).sum()
        total.backward(inputs=inputs)

    def subset(self, on: Tensor) -> Self:
        """The batch of the examples with the indices ``on``, shape ``(k,)``."""
        return self._with(mapped(lambda t: t[on.to(t.device)], self.data))

    def split(self, m: int) -> list[Self]:
        """Micro-batches of ``m`` examples in order; the last has what remains."""
        parts = [slice(i, i + m) for i in range(0, len(self), m)]
        return [self._with(mapped(lambda t, s=s: t[s], self.data)) for s in parts]  # type: ignore[misc]

    def _with(self, data: Data) -> Self:
        other = copy(self)
        other.data, other._n = data, _count(data)
        return other


@dataclass(frozen=True)
class _Supervised:
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, model: nn.Module, data: Data) -> Tensor:
        inputs, targets = data
        losses = self.criterion(model(inputs), targets)
        return losses.flatten(1).mean(1) if losses.dim() > 1 else losses


def mapped(f: Callable[[Tensor], Tensor], data: Data) -> Data:
    """Nested data with ``f`` of every tensor."""
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
    """The tensors of nested data, in order."""
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
