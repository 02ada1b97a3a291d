"""The weak error between real optimizers and their equations, and its order in lr and rho."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from steppe.sde.equation import Equation
from steppe.sde.finite_sum import FiniteSum, SDEError
from steppe.sde.paths import RealPaths, draw, largest, mover, require_finite

LEVELS = ((1, 1 / 3), (2, -2.0), (4, 8 / 3))  # the equation's steps to one of the optimizer, and their weights
GROUPS = 16  # groups of paths, for the standard error
RESOLVED = 2.0  # standard errors that an error must exceed to enter a fit

Errors = dict[str, list[float]]  # by test function, one number for each group
Progress = Callable[[int, int], None]  # (steps done, steps in all)


def functions(problem: FiniteSum) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the test functions: ``(x of shape (paths, d)) -> (paths,)``."""
    return {"f": vmap(lambda x: problem.losses(x).mean()), "|x|^2": lambda x: x.square().sum(1)}


def whole_steps(time: float, lr: float) -> int:
    """Return ``time / lr``; raise :class:`SDEError` if it is no positive integer."""
    steps = round(time / lr)
    if steps < 1 or abs(steps * lr - time) > 1e-9 * time:
        raise SDEError(f"time must be a positive multiple of lr, got {time:g} and {lr:g}")
    return steps


def weak_error(
    equation: Equation,
    start: Tensor,
    time: float,
    paths: int = 4000,
    seed: int = 0,
    progress: Progress = lambda step, steps: None,
) -> Errors:
    """Return estimates of ``E phi(x_k) - E phi(X(time))``, ``k = time / lr``, from each of 16 groups of paths.

    Extrapolation removes the error of Euler-Maruyama to third order: paths of the equation with 1, 2 and 4 steps to one
    of the optimizer's, along one Brownian motion, weighted 1/3, -2 and 8/3 (Talay and Tubaro 1990). Without replacement
    the optimizer's batch holds the examples along which the Brownian motion has moved most. Every batch is still
    equally likely, and the paths stay closer, so that fewer are needed. Equal seeds use the same batches and Brownian
    motion for every radius, so that differences between radii have little noise.

    Args:
        equation: the equation of the scheme that is compared.
        start: start of every path, shape ``(d,)``.
        time: a multiple of ``lr``.
        paths: number of paths, at least 32.
        seed: seed of batches and Brownian motion.
        progress: called after every step of the optimizer, ``(done, of)``.

    Raises:
        SDEError: ``time`` is no multiple of ``lr``, there are too few paths, or one is no longer finite.
    """
    scheme, problem = equation.scheme, equation.problem
    steps = whole_steps(time, scheme.lr)
    if paths < 2 * GROUPS:
        raise SDEError(f"paths must be at least {2 * GROUPS}, got {paths}")
    problem.check(start)
    generator, n = torch.Generator().manual_seed(seed), len(problem)
    move, noise = mover(equation), equation.sampling.factor.shape[1]
    x = start.expand(paths, -1)
    optimizer, levels = RealPaths(problem, scheme, x), [x] * len(LEVELS)
    for step in range(1, steps + 1):
        dW = (scheme.lr / 4) ** 0.5 * torch.randn(4, paths, noise, dtype=x.dtype, generator=generator)
        with_examples = dW.sum(0)[:, :n]
        batch = draw(scheme, n, paths, generator) if scheme.replacement else largest(with_examples, scheme)
        real = optimizer.step(batch)
        for i, (parts, _) in enumerate(LEVELS):
            for increment in dW.unflatten(0, (parts, -1)).sum(1):
                levels[i] = move(levels[i], scheme.lr / parts, increment)
        require_finite(levels[-1], f"the equation's paths at time {step * scheme.lr:g}")
        progress(step, steps)
    errors: Errors = {}
    for name, phi in functions(problem).items():
        expected = sum(
            (weight * phi(level) for level, (_, weight) in zip(levels, LEVELS, strict=True)), torch.zeros(())
        )
        errors[name] = [float(part.mean()) for part in (phi(real) - expected).chunk(GROUPS)]
    return errors


@dataclass(frozen=True)
class GroupMean:
    """The mean of independent groups and its standard error."""

    mean: float
    error: float

    @property
    def resolved(self) -> bool:
        """Return True if the mean differs from zero by more than two standard errors."""
        return abs(self.mean) > RESOLVED * self.error


def estimate(groups: Sequence[float]) -> GroupMean:
    """Return mean and standard error of independent groups."""
    values = torch.tensor(groups, dtype=torch.float64)
    return GroupMean(float(values.mean()), float(values.std()) / math.sqrt(len(groups)))


@dataclass(frozen=True)
class Slope:
    """The exponent of ``error = C h^slope`` with its 95 % confidence interval, from ``points`` resolved errors."""

    slope: float
    low: float
    high: float
    points: int


def fit(h: Sequence[float], errors: Sequence[GroupMean]) -> Slope | None:
    """Return the weighted least squares fit of ``log abs(error)`` on ``log h``; ``None`` below two resolved errors.

    The interval carries the Monte Carlo error alone (delta method: ``log abs(error)`` has standard error ``error /
    abs(mean)``). It does not carry the curvature of the line by higher orders.
    """
    kept = [
        (math.log(a), math.log(abs(e.mean)), max(e.error / abs(e.mean), 1e-12) ** -2)  # the error is 0 without noise
        for a, e in zip(h, errors, strict=True)
        if e.resolved
    ]
    if len(kept) < 2:
        return None
    a, y, w = torch.tensor(kept, dtype=torch.float64).T
    centred = a - (w * a).sum() / w.sum()
    spread = float((w * centred**2).sum())
    slope = float((w * centred * y).sum()) / spread
    half = 1.96 / math.sqrt(spread)
    return Slope(slope, slope - half, slope + half, len(kept))
