"""The weak error: real optimizers against their equations, and its order in lr and rho."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from steppe.sde.equation import Equation
from steppe.sde.problem import Problem, SDEError
from steppe.sde.real import RealPaths, draw, largest
from steppe.sde.simulate import Progress, mover, require_finite

LEVELS = ((1, 1 / 3), (2, -2.0), (4, 8 / 3))  # steps of the equation in one of the optimizer, weights
GROUPS = 16  # of paths, for the standard error
RESOLVED = 2.0  # standard errors that an error must exceed to enter a fit

Errors = dict[str, list[float]]  # of each test function, one number a group


def functions(problem: Problem) -> dict[str, Callable[[Tensor], Tensor]]:
    """The test functions: ``(x of shape (paths, d)) -> (paths,)``."""
    return {"f": vmap(lambda x: problem.losses(x).mean()), "|x|^2": lambda x: x.square().sum(1)}


def whole_steps(time: float, lr: float) -> int:
    """``time / lr``, refused where it is no positive integer."""
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
    """``E phi(x_k) - E phi(X(time))``, ``k = time / lr``: independent estimates, one for each of 16 groups of paths.

    The error of Euler-Maruyama is removed to third order: paths of the equation with 1, 2 and 4 steps to one of the
    optimizer's, along one Brownian motion, weighted 1/3, -2 and 8/3 (Talay and Tubaro 1990). Without replacement the
    optimizer's batch holds the examples along which the Brownian motion has moved most: every batch is equally likely,
    as it must be, and the paths stay closer, so that fewer are needed. Equal seeds use the same batches and Brownian
    motion for every radius, so that differences between radii are sharp.

    Args:
        equation: of the scheme that is compared.
        start: where every path begins, shape ``(d,)``.
        time: a multiple of ``lr``.
        paths: at least 32.
        seed: of batches and Brownian motion.
        progress: called after every step of the optimizer, ``(done, of)``.

    Raises:
        SDEError: ``time`` is no multiple of ``lr``, there are too few paths, or one ceases to be finite.
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
class Estimate:
    """A mean over groups and its standard error."""

    mean: float
    error: float

    @property
    def resolved(self) -> bool:
        """Whether it is told from zero."""
        return abs(self.mean) > RESOLVED * self.error


def estimate(groups: Sequence[float]) -> Estimate:
    """Mean and standard error of independent groups."""
    return Estimate(float(np.mean(groups)), float(np.std(groups, ddof=1)) / math.sqrt(len(groups)))


@dataclass(frozen=True)
class Slope:
    """The exponent of ``error = C h^slope`` with its 95 % confidence interval, from ``points`` resolved errors."""

    slope: float
    low: float
    high: float
    points: int


def fit(h: Sequence[float], errors: Sequence[Estimate]) -> Slope | None:
    """Weighted least squares of ``log abs(error)`` on ``log h``; ``None`` where fewer than two errors are resolved.

    The interval carries the Monte Carlo error alone (delta method: ``log abs(error)`` has standard error ``error /
    abs(mean)``), not that higher orders bend the line.
    """
    kept = [
        (math.log(a), math.log(abs(e.mean)), 1 / max(e.error / abs(e.mean), 1e-12))  # without noise the error is 0
        for a, e in zip(h, errors, strict=True)
        if e.resolved
    ]
    if len(kept) < 2:
        return None
    a, y, root_weight = np.array(kept).T
    w = root_weight**2
    centred = a - np.average(a, weights=w)
    spread = float((w * centred**2).sum())
    slope = float((w * centred * y).sum()) / spread
    half = 1.96 / math.sqrt(spread)
    return Slope(slope, slope - half, slope + half, len(kept))
