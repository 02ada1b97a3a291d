"""Pieces that the tests need: a probe with exact norms, and losses that are plain functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import steppe
from steppe.pieces.protocol import Declaration


@dataclass(frozen=True)
class ExactNorms:
    """``norm(grad f_i)`` over the perturbed parameters, one backward an example."""

    declares: ClassVar[Declaration] = Declaration(examples=True)

    def __call__(self, f: steppe.Oracle) -> Tensor:
        rows = []
        for i in range(len(f.batch())):
            rows.append(f.movable(f.grad(on=torch.tensor([i]))).norm())
        return torch.stack(rows)


class Quadratic(nn.Module):
    """``f_i = w^T A_i w / 2 + b_i^T w`` of a weight vector, as a module of one parameter."""

    def __init__(self, w0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(w0, dtype=torch.float64))

    def batch(self, A, b) -> steppe.Batch:
        A, b = torch.as_tensor(A, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
        return steppe.Batch(self, quadratic_losses, {"A": A, "b": b})


def quadratic_losses(model: Quadratic, data) -> Tensor:
    w = model.weight
    return 0.5 * torch.einsum("i,nij,j->n", w, data["A"], w) + data["b"] @ w


A4 = [[[3.0, 0], [0, 4]], [[1, 0], [0, 8]], [[2, 1], [1, 2]], [[5, 0], [0, 0.5]]]
B4 = [[0.0, 0], [1, -1], [-1, 2], [0.5, 0.5]]
