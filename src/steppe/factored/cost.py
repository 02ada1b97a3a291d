"""Whether gradients are cheaper to hold whole or as factors: a rule from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What is to be done with ``G_k`` (``height x width``, ``rows`` of factors a part).

    Attributes:
        products: how many products with the factors, of ``rows^2 (height + width)`` multiplications a part each: the
            Gram matrices, the perturbed forward and its backward.
        weighted: whether a weighted sum of the gradients is to follow, which takes factors another
            ``rows height width``.
        memory: how many multiplications the passes over a number of ``G_k`` in memory are worth.
    """

    products: int
    weighted: bool = False
    memory: int = 20

    def whole(self, rows: int, height: int, width: int) -> bool:
        """Whether to hold ``G_k``: ``rows height width`` to make, and passes over it in memory."""
        factors = self.products * rows * rows * (height + width) + self.weighted * rows * height * width
        return factors > (rows + self.memory) * height * width

    def table(self, rows: int, height: int) -> bool:
        """Whether to hold a table whose rows are looked up: where it is no larger than two rows a lookup."""
        return height <= 2 * rows


class Everything(Cost):
    """Everything is held."""

    def whole(self, rows: int, height: int, width: int) -> bool:
        """Yes."""
        return True

    def table(self, rows: int, height: int) -> bool:
        """Yes."""
        return True


TWO_PASSES, NORMS, WEIGHTED, HELD = Cost(3, memory=50), Cost(1), Cost(1, weighted=True), Everything(0)
