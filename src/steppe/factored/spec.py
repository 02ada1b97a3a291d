"""A convolution's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Stride, padding and dilation by dimension, groups, and the weight's shape."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shape: torch.Size

    def backward(self, delta: Tensor, x: Tensor, W: Tensor, groups: int, mask: list[bool]) -> Any:
        """Gradients of input and weight, as ``mask`` asks."""
        zero = [0] * len(self.stride)
        where = (self.stride, self.padding, self.dilation, False, zero, groups, [*mask, False])
        return torch.ops.aten.convolution_backward(delta, x, W, None, *where)

    def weight_gradient(self, delta: Tensor, x: Tensor, k: int = 1) -> Tensor:
        """The gradient of the weight; of ``k`` weights, below each other, where ``k`` parts are side by side."""
        W = delta.new_empty(k * self.shape[0], *self.shape[1:])  # for its shape alone
        made: Tensor = self.backward(delta, x, W, k * self.groups, [False, True])[1]
        return made

    def forward(self, x: Tensor, W: Tensor, groups: int, b: Tensor | None = None) -> Tensor:
        """The convolution."""
        zero = [0] * len(self.stride)
        return torch.convolution(x, W, b, self.stride, self.padding, self.dilation, False, zero, groups)

    def positions(self, size: Sequence[int]) -> list[int]:
        """The output's size for an input's."""
        dims = zip(size, self.padding, self.dilation, self.shape[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in dims]
