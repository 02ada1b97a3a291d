"""What may answer an oracle's questions in its place: the optimizer hands in :mod:`steppe.factored`."""

from typing import Any, Protocol

from torch import Tensor

from steppe.batch import Batch
from steppe.engine.update import Update
from steppe.engine.vector import Vector


class Shortcuts(Protocol):
    """Cheaper ways to the answers of an :class:`~steppe.Oracle`, exact to rounding.

    ``None`` is: take the plain way. Every method is asked by the oracle ``f``.
    """

    def update(self, f: Any, rule: Any, m: int | None) -> Update | None:
        """The mean of the rule's updates over micro-batches of ``m`` examples, or its update on the batch."""

    def example_norms(self, f: Any) -> Tensor | None:
        """The norm of every per-example gradient at ``w``, shape ``(n,)``."""

    def weighted_gradient(self, f: Any, weights: Tensor) -> Vector | None:
        """``sum_i weights_i grad f_i`` at ``w``."""

    def adds(self, f: Any, batch: Batch) -> bool:
        """Whether the batch's gradient is the weighted mean of its parts', as no example changes another's loss."""
