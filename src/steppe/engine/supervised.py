"""The loss of a supervised batch, split into model and criterion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steppe.engine.nested import Data


@dataclass(frozen=True)
class Supervised:
    """``criterion(model(inputs), targets)``, one loss an example: the loss of :meth:`Batch.supervised`."""

    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, model: nn.Module, data: Data) -> Tensor:
        """Return the losses, shape ``(n,)``."""
        inputs, targets = data
        return by_example(self.criterion(model(inputs), targets))


def by_example(losses: Tensor) -> Tensor:
    """Return one loss an example: the mean of what it has in further dimensions, as tokens or pixels."""
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
