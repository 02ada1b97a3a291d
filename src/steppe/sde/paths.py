"""Many independent paths at once: of a real optimizer, and of an equation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import vmap

from steppe.batch import Batch, mapped
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.vector import TINY, Vector
from steppe.optimizer import SharpnessAware
from steppe.pieces.geometry import Euclidean
from steppe.rule import Micro, Plain, Rule
from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError
from steppe.sde.scheme import Scheme


class RealPaths:
    """Paths of the library's optimizer: ``step`` takes a batch for every path and returns the new points.

    All paths are rows of one parameter and the loss is the sum of theirs, so that one step of one optimizer is a step
    of each path. The rows' gradients are independent except in SAM's norm, which :class:`RowNorm` takes row by row.

    Args:
        problem: the finite sum.
        scheme: rule, learning rate and radius.
        x: the starts, shape ``(paths, d)``.

    Example:
        >>> paths = RealPaths(problem, scheme, x0.expand(100, -1))
        >>> for _ in range(20):
        ...     x = paths.step(draw(scheme, len(problem), 100, generator))
    """

    def __init__(self, problem: FiniteSum, scheme: Scheme, x: Tensor) -> None:
        self.model = _Paths(problem, x)
        base = torch.optim.SGD(self.model.parameters(), lr=scheme.lr)
        full = self.model.batch(torch.arange(len(problem)).expand(len(x), -1)) if scheme.full else None
        rule = by_row(scheme.rule, len(x))
        self.optimizer = SharpnessAware(base, rule, scheme.rho, full=full, parallel=False, check_finite=False)

    def step(self, index: Tensor) -> Tensor:
        """Take one step, path ``p`` on the examples ``index[p]``; return the new points, shape ``(paths, d)``.

        Raises:
            SDEError: a path is no longer finite.
        """
        self.optimizer.step(self.model.batch(index))
        x = self.model.x.detach().clone()
        require_finite(x, "the optimizer's paths")
        return x


def draw(scheme: Scheme, n: int, paths: int, generator: torch.Generator) -> Tensor:
    """Return a random batch for every path, indices of shape ``(paths, size)``."""
    if scheme.replacement:
        return torch.randint(n, (paths, scheme.size), generator=generator)
    return largest(torch.rand(paths, n, generator=generator), scheme)


def largest(z: Tensor, scheme: Scheme) -> Tensor:
    """Return the batch of the largest of ``n`` exchangeable numbers: every set, in every order, is equally likely."""
    return z.argsort(1, descending=True)[:, : scheme.size]


@dataclass(frozen=True)
class RowNorm:
    """``d / norm(d)`` in every row: the Euclidean geometry of many paths in one parameter."""

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        """Return ``d`` with rows of length 1."""
        return d.map(lambda t: t / (torch.linalg.vector_norm(t, dim=1, keepdim=True) + TINY))


def by_row(rule: AnyRule, paths: int) -> AnyRule:
    """Return the rule for ``paths`` rows at once: micro-batches hold ``m`` examples of each row, norms are by row."""
    if isinstance(rule, Micro):
        return Micro(rule.m * paths, by_row(rule.rule, paths))
    if isinstance(rule, Plain):
        return rule
    assert isinstance(rule, Rule)  # a scheme holds no other
    return replace(rule, geometry=RowNorm()) if isinstance(rule.geometry, Euclidean) else rule


class _Paths(nn.Module):
    """One parameter with a row for each path."""

    def __init__(self, problem: FiniteSum, x: Tensor) -> None:
        super().__init__()
        self.x, self.problem = nn.Parameter(x.clone()), problem

    def batch(self, index: Tensor) -> Batch:
        """Return row ``p`` on the examples ``index[p]``, ordered so that micro-batches hold examples of every path."""
        paths, size = index.shape
        rows = torch.arange(paths).repeat(size)
        return Batch(self, _losses, {"row": rows, "example": index.T.flatten()})


def _losses(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Return the loss of every pair of row and example, times the number of rows: the mean is the sum over rows."""
    assert isinstance(model, _Paths)
    rows = mapped(lambda t: t[data["example"]], model.problem.data)
    losses: Tensor = vmap(model.problem.loss)(model.x[data["row"]], rows)
    return losses * len(model.x)


def simulate(
    equation: Equation, x: Tensor, time: float, steps: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the paths of an equation after every step of Euler-Maruyama, ``X <- X + b(X) h + sigma(X) dW``.

    Args:
        equation: drift and diffusion.
        x: the starts, shape ``(paths, d)``.
        time: length of the paths; the scheme's step ``k`` is at time ``k lr``.
        steps: number of steps, ``h = time / steps``.
        generator: source of the Brownian increments.

    Raises:
        SDEError: a path is no longer finite; the message names the step.

    Example:
        >>> *_, end = simulate(equation, x0.expand(1000, -1), time=2.0, steps=400)
    """
    h = time / steps
    move = mover(equation)
    noise = equation.sampling.factor.shape[1]
    for step in range(1, steps + 1):
        dW = h**0.5 * torch.randn(len(x), noise, dtype=x.dtype, generator=generator)
        x = move(x, h, dW)
        require_finite(x, f"the equation's paths after step {step} of {h:g}")
        yield x


def mover(equation: Equation) -> Callable[[Tensor, float, Tensor], Tensor]:
    """Return one step for all paths, ``(X, h, dW) -> X + b(X) h + sigma(X) dW``."""
    coefficients = vmap(equation.coefficients)

    def move(x: Tensor, h: float, dW: Tensor) -> Tensor:
        b, sigma = coefficients(x)
        end: Tensor = x + h * b + torch.einsum("pdr,pr->pd", sigma, dW)
        return end

    return move


def require_finite(x: Tensor, what: str) -> None:
    """Raise :class:`SDEError` if any path is not finite."""
    bad = int((~x.isfinite().all(-1)).sum())
    if bad:
        raise SDEError(f"{what} are not finite in {bad} of {len(x)}: lower lr or rho, or begin elsewhere")
