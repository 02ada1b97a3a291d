"""A convolution's gradient: every micro-batch one group of a grouped convolution, or patches as rows of a product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.factored.cost import Cost
from steppe.factored.parts import Parts
from steppe.factored.patches import patches
from steppe.factored.spec import Spec
from steppe.factored.terms import Dense

LOOP = 8  # inputs in a part from which on a CPU one convolution a part is faster than a group a part, which copies


def one_by_one(x: Tensor) -> bool:
    """Whether parts ``(k, m, C, ...)`` go through one convolution each; an accelerator would wait for so many calls."""
    return x.device.type == "cpu" and x.shape[1] >= LOOP


def side_by_side(x: Tensor) -> Tensor:
    """``(k, m, C, ...)`` as ``(m, k C, ...)``: the parts' channels beside each other."""
    return x.transpose(0, 1).flatten(1, 2)


def below(y: Tensor, k: int) -> Tensor:
    """The inverse of :func:`side_by_side`: ``(k m, C, ...)``."""
    return y.reshape(len(y), k, -1, *y.shape[2:]).transpose(0, 1).reshape(len(y) * k, -1, *y.shape[2:])


@dataclass(frozen=True)
class Convolved:
    """A convolution's term: ``x`` ``(n, q, C, ...)`` and ``left`` ``(n, q, C_out, ...)``, ``q`` inputs an example."""

    x: Tensor
    left: Tensor
    spec: Spec

    def to(self, dtype: torch.dtype) -> Convolved:
        """In another type."""
        return Convolved(self.x.to(dtype), self.left.to(dtype), self.spec)

    def shape(self, parts: Parts) -> tuple[int, int, int]:
        """Rows in a part, height and width of ``G_k``."""
        return min(parts.m, parts.n) * self.left[0, :, 0].numel(), *self.size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of ``G_k``."""
        return self.spec.shape[0], self.spec.shape[1:].numel()

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What :meth:`write` wants of the parts."""
        return self.left, self.x

    def write(self, G: Tensor, left: Tensor, x: Tensor, add: bool) -> None:
        """``G_k`` of some parts, or add them to what is there."""
        if one_by_one(x):
            made = [self.spec.weight_gradient(d, a).reshape(G[0].shape) for d, a in zip(left, x, strict=True)]
        else:
            whole = self.spec.weight_gradient(side_by_side(left), side_by_side(x), len(x))
            G, made = G[None], [whole.reshape(G.shape)]
        for to, g in zip(G, made, strict=True):
            to.add_(g) if add else to.copy_(g)

    def dense(self) -> Dense:
        """The same as a product of patches."""
        left = self.left.flatten(3).permute(0, 1, 3, 2).flatten(1, 2)
        right = patches(self.x.flatten(0, 1), self.spec)
        return Dense(left, right.reshape(len(self.x), -1, right.shape[-1]), source=self)

    def weighted(self, c: Tensor) -> Tensor:
        """``sum_i c_i G_i`` over examples, by one convolution: of the weight's shape."""
        delta = self.left * c.to(self.left.dtype).reshape(-1, *[1] * (self.left.dim() - 1))
        return self.spec.weight_gradient(delta.flatten(0, 1), self.x.flatten(0, 1))

    def suits_patches(self, parts: Parts, cost: Cost) -> bool:
        """Whether the product of patches is the cheaper one; it takes one group."""
        rows, height, width = self.shape(parts)
        return self.spec.groups == 1 and not cost.whole(2 * rows, height, width)
