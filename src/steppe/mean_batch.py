"""A closure that can be cut into parts, whose loss is one mean."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import NoReturn, Self

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine import checks
from steppe.engine.nested import Data


class MeanBatch(Batch):
    """A batch whose loss is a mean over what it is given: ``m=`` and ``sampled=`` without losses of single examples.

    ``loss(model, data)`` is evaluated on the whole data and on parts of them, cut along the first dimension. m-SAM is

        u = sum_j w_j / w  u(S_j),    by default w_j = the number of examples in S_j

    so the plain step is that of the whole batch where ``L(batch) = sum_j w_j / w L(S_j)``. A mean over the tokens of a
    part is such a loss with the number of its tokens as ``weight``; with equal weights, tokens in short texts count
    more under ``m=`` than in the whole batch. Where the parts do not add up to the whole, the first step warns. That
    is so for contrastive losses, and others that compare examples with one another: there ``m=`` is another objective.

    Parts of weight 0 are left out. With sharded parameters (``fully_shard``), where every gradient is a mean over the
    ranks, a part is that of all ranks, in the mean by their weights. It is left out where no rank weighs it; where this
    rank alone does not, its loss is run and counts 0. ``torch.nn.functional.cross_entropy`` has the gradient 0 there; a
    loss of one's own that divides by 0 in its backward has NaN, so that all ranks skip the step.

    What looks at single examples (RW-SAM, ESAM, gradient noise) is refused: it needs a :class:`~steppe.Batch`.

    Args:
        model: as for :class:`~steppe.Batch`.
        loss: ``(model, data) -> loss``, a 0-dim tensor: the mean over the examples (or tokens) of ``data``.
        data: as for :class:`~steppe.Batch`.
        weight: ``(data) -> number``, the weight of a part with these data; ``None`` counts examples. A tensor is read
            on the host: count on the CPU where the data are there.
        scaler: as for :class:`~steppe.Batch`.

    Raises:
        TypeError, ValueError: as :class:`~steppe.Batch`; in ``step``, where the loss has another shape.

    Example:
        >>> tokens = lambda data: (data["labels"] != -100).sum()
        >>> batch = MeanBatch(model, lambda model, data: model(**data).loss, inputs, weight=tokens)
        >>> loss = steppe.SAM(base, rho=0.05, m=1, sampled=1).step(batch)
    """

    per_example = False

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Data], Tensor],
        data: Data,
        *,
        weight: Callable[[Data], Tensor | float] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        super().__init__(model, loss, data, scaler=scaler)
        if weight is not None and not callable(weight):
            raise TypeError(f"weight must be a function (data) -> number, got {weight!r}")
        self._weigh = weight

    @property
    def weight(self) -> float:
        """The weight of this part among others."""
        weight = len(self) if self._weigh is None else float(self._weigh(self.data))
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must return a finite number >= 0, got {weight!r}")
        return weight

    def times(self, c: float) -> Self:
        """Return this batch with its loss times ``c``, at least 0; for 0 a mean over nothing, NaN, is 0 too."""
        other, loss = copy(self), self.loss
        other.loss = lambda model, data: c * (loss(model, data) if c else loss(model, data).nan_to_num())
        return other

    def value(self) -> Tensor:
        """Run one forward and return the mean loss.

        Raises:
            ValueError: the loss function returned something else than one number.
        """
        loss = self.loss(self.model, self.data)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss must return the mean loss, a tensor with one number, got {checks.kind(loss)}")
        return loss.reshape(())

    def backward(
        self, losses: Tensor, weights: Tensor | float | None = None, inputs: Sequence[Tensor] | None = None
    ) -> None:
        """Run the backward of the mean loss, or of ``weights`` times the batch's weight times it."""
        if isinstance(weights, Tensor):
            self.require_losses("weights on examples")
        super().backward(losses, None if weights is None else weights * self.weight, inputs)

    def losses(self) -> NoReturn:
        """Raise ``TypeError``: only their mean is known."""
        self.require_losses("their losses")

    def require_losses(self, use: str) -> NoReturn:
        """Raise ``TypeError``: only their mean is known."""
        raise TypeError(
            f"this method looks at single examples ({use}), and a MeanBatch has one loss for all: pass a "
            "steppe.Batch(model, loss, data) whose loss returns one loss per example"
        )
