"""On which examples the second gradient is taken; asked at ``w + eps``."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.pieces.protocol import Declaration


@dataclass(frozen=True)
class All:
    """The whole batch."""

    declares: ClassVar[Declaration] = Declaration(whole_batch=True)

    def __call__(self, f: Oracle) -> None:
        return


@dataclass(frozen=True)
class Sharpest:
    """The share ``gamma`` of the batch whose loss rises most from ``w`` to ``w + eps``: ESAM (arXiv 2110.03141).

    ``max(1, int(gamma n))`` examples exactly (the authors' code asks for more than the k-th rise, so takes one less).
    It costs one more forward, unless ``gamma`` is 1. Under data parallelism every rank chooses from its own examples.

    Args:
        gamma: the share of the examples, in (0, 1].

    Raises:
        ValueError: ``gamma`` is not in (0, 1].
    """

    gamma: float = 0.5

    def __post_init__(self) -> None:
        checks.positive_share("gamma", self.gamma)

    @property
    def declares(self) -> Declaration:
        """The examples and their losses, unless ``gamma`` is 1."""
        return Declaration(examples=self.gamma < 1, losses_at_w=self.gamma < 1)

    def __call__(self, f: Oracle) -> Tensor | None:
        if self.gamma == 1:
            return None
        rise = f.losses() - f.losses_at_w()
        return torch.topk(rise, max(1, int(round(self.gamma * len(rise), 6)))).indices
