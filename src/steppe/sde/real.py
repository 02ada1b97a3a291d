"""The real optimizer on many independent paths at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from steppe.batch import Batch
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.vector import TINY, Vector
from steppe.optimizer import SharpnessAware
from steppe.rule import Micro, Plain, Rule
from steppe.sde.problem import Problem
from steppe.sde.scheme import Scheme
from steppe.sde.simulate import require_finite


class RealPaths:
    """The library's optimizer on many paths: ``step`` takes every path's batch and returns where the paths are.

    All paths are rows of one parameter and the loss is their sum, so that one step of one optimizer is a step of each.
    Gradients of different rows do not meet, except in SAM's norm: there :class:`RowNorm` takes each row's own.

    Args:
        problem: the finite sum.
        scheme: rule, learning rate, radius.
        x: where the paths begin, shape ``(paths, d)``.

    Example:
        >>> paths = RealPaths(problem, scheme, x0.expand(100, -1))
        >>> for _ in range(20):
        ...     x = paths.step(draw(scheme, len(problem), 100, generator))
    """

    def __init__(self, problem: Problem, scheme: Scheme, x: Tensor) -> None:
        self.model = _Paths(problem, x)
        base = torch.optim.SGD(self.model.parameters(), lr=scheme.lr)
        full = self.model.batch(torch.arange(len(problem)).expand(len(x), -1)) if scheme.full else None
        rule = by_row(scheme.rule, len(x))
        self.optimizer = SharpnessAware(base, rule, scheme.rho, full=full, parallel=False, check_finite=False)

    def step(self, index: Tensor) -> Tensor:
        """One step, path ``p`` on the examples ``index[p]``, shape ``(paths, size)``; the paths, shape ``(paths, d)``.

        Raises:
            SDEError: a path ceases to be finite.
        """
        self.optimizer.step(self.model.batch(index))
        x = self.model.x.detach().clone()
        require_finite(x, "the optimizer's paths")
        return x


def draw(scheme: Scheme, n: int, paths: int, generator: torch.Generator) -> Tensor:
    """A random batch for every path, indices of shape ``(paths, size)``."""
    if scheme.replacement:
        return torch.randint(n, (paths, scheme.size), generator=generator)
    return largest(torch.rand(paths, n, generator=generator), scheme)


def largest(z: Tensor, scheme: Scheme) -> Tensor:
    """The batch of the largest of ``n`` exchangeable numbers: every set, in every order, is equally likely."""
    return z.argsort(1, descending=True)[:, : scheme.size]


@dataclass(frozen=True)
class RowNorm:
    """``d / norm(d)`` for each row by itself: the Euclidean geometry of many paths in one parameter."""

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        """Every row at length 1."""
        return d.map(lambda t: t / (torch.linalg.vector_norm(t, dim=1, keepdim=True) + TINY))


def by_row(rule: AnyRule, paths: int) -> AnyRule:
    """The same rule for ``paths`` rows at once: micro-batches hold ``m`` examples of each, norms are each row's own."""
    if isinstance(rule, Micro):
        return Micro(rule.m * paths, by_row(rule.rule, paths))
    if isinstance(rule, Plain):
        return rule
    assert isinstance(rule, Rule)  # a scheme holds no other
    normalised = Scheme(rule, 1.0, 0.0, 1).normalised
    return replace(rule, geometry=RowNorm()) if normalised else rule


class _Paths(nn.Module):
    """A row for each path."""

    def __init__(self, problem: Problem, x: Tensor) -> None:
        super().__init__()
        self.x, self.problem = nn.Parameter(x.clone()), problem

    def batch(self, index: Tensor) -> Batch:
        """Row ``p`` on the examples ``index[p]``, ordered so that micro-batches hold some examples of every path."""
        paths, size = index.shape
        rows = torch.arange(paths).repeat(size)
        return Batch(self, _losses, {"row": rows, "example": index.T.flatten()})


def _losses(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """The loss of every pair of row and example, times the number of rows: their mean is the sum over rows."""
    assert isinstance(model, _Paths)
    rows = torch.utils._pytree.tree_map(lambda t: t[data["example"]], model.problem.data)
    losses: Tensor = vmap(model.problem.loss)(model.x[data["row"]], rows)
    return losses * len(model.x)
