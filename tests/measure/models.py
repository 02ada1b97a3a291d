"""Small models, their data, and dense matrices by autograd alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steppe.engine.vector import Vector
from steppe.measure import Problem

CRITERION = nn.CrossEntropyLoss(reduction="none")


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def data(n: int = 23, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=draw, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=draw)


def batches(xy: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(xy[0].split(list(sizes)), xy[1].split(list(sizes)), strict=True))


def losses(model: nn.Module, xy: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(xy[0]), xy[1], reduction="none")


def joined(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def jacobian(f: Tensor, parameters: list[Tensor]) -> Tensor:
    """Rows are gradients of the entries of ``f``; a parameter that takes no part is a zero."""
    rows = [torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True) for y in f.reshape(-1)]
    return torch.stack(
        [joined(torch.zeros_like(p) if g is None else g for g, p in zip(r, parameters, strict=True)) for r in rows]
    )


def hessian(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    g = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    g = joined(torch.zeros_like(p) if t is None else t for t, p in zip(g, parameters, strict=True))
    if not g.requires_grad:
        return torch.zeros(len(g), len(g), dtype=g.dtype)
    return jacobian(g, parameters)


def dense(kind: str, model: nn.Module, xy: tuple[Tensor, Tensor]) -> Tensor:
    parameters, n = list(model.parameters()), len(xy[0])
    if kind == "Hessian":
        return hessian(losses(model, xy).mean(), parameters)
    if kind == "GaussNewton":
        z = model(xy[0])
        J, p = jacobian(z, parameters).view(n, z.shape[1], -1), z.softmax(1).detach()
        B = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        return (J.transpose(1, 2) @ B @ J).mean(0)
    G = jacobian(losses(model, xy), parameters)
    if kind == "EmpiricalFisher":
        return G.T @ G / n
    assert kind == "GradientCovariance"
    return torch.cov(G.T, correction=0)


def problem(model: nn.Module | None = None, **options) -> Problem:
    return Problem(model or net(), CRITERION, batches(data(), 5, 16, 2), **options)


class Quadratic(nn.Module):
    """``1/2 sum_j h_j (w_j - c_j)^2`` for every example: its Hessian is ``diag(h)``, its minimum ``c``."""

    def __init__(self, h: list[float], c: list[float], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.h, self.c = torch.tensor(h, dtype=dtype), torch.tensor(c, dtype=dtype)
        self.w = nn.Parameter(self.c.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.h * (self.w - self.c) ** 2).sum() / 2


def quadratic(h: list[float], c: list[float] | None = None, n: int = 4) -> Problem:
    model = Quadratic(h, c or [0.0] * len(h))
    return Problem(model, lambda model, x: model(x), torch.ones(n, dtype=torch.float64))


class Dense:
    """A symmetric matrix as an operator."""

    def __init__(self, D: torch.Tensor) -> None:
        self.D, self.like, self.products = D, [D[0]], 0

    def __matmul__(self, v: Vector) -> Vector:
        self.products += 1
        (t,) = v.materialised()
        return Vector([self.D @ t])


def spread(d: int = 40) -> Dense:
    Q, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    values = torch.cat([torch.tensor([12.0, 5.0, -7.0, -2.0]), torch.linspace(-0.5, 0.9, d - 4)]).double()
    return Dense(Q @ values.diag() @ Q.T)
