"""The rise of the loss in a ball around the weights: worst case, average case, m-sharpness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from steppe.engine import checks
from steppe.engine.vector import Vector
from steppe.measure.ascent import Ball, Surface, auto_pgd
from steppe.measure.problem import Problem
from steppe.measure.trace import mean_and_error

Norm = Literal["l2", "linf"]


@dataclass(frozen=True)
class Sharpness:
    """A rise of the loss, averaged over disjoint subsets of the examples.

    Attributes:
        value: the mean over the subsets, weighted by their sizes.
        error: the standard error over subsets (and draws), infinite for a single one.
        rises: the rise of every subset (and draw), in order.
        passes: passes over a subset that were used.
    """

    value: float
    error: float
    rises: tuple[float, ...]
    passes: int


@dataclass(frozen=True)
class WorstCase:
    """``mean over subsets S of size m of max_{norm(T^-1 eps)_p <= rho} L_S(w + eps) - L_S(w)``: m-sharpness.

    Foret et al. 2021 (section 4) for subsets; ``T = diag(abs(w))`` on all parameters where ``adaptive``, else the
    identity (Andriushchenko et al. 2023, arXiv 2302.07011, equation 1). Auto-PGD searches for the maximum; the result
    is the best of all its points, ``w`` included, so it is never negative and a *lower* bound. With one step the
    perturbation is SAM's. At a critical point, to second order, the rise is ``rho^2 / 2 lambda_max(T H T)`` for l2.

    Args:
        rho: the radius.
        norm: ``"l2"`` or ``"linf"``.
        adaptive: whether every coordinate of the ball is scaled by its weight's size.
        m: examples that share one perturbation; ``None`` is all of them.
        steps: steps of the ascent.
        starts: number of ascents. The first starts at ``w``, or at a random point where the gradient is 0; the others
            start at random points.
        seed: seed of the random points.

    Raises:
        ValueError: an argument is out of its range.
        FloatingPointError: in a measurement, if the loss is not finite inside the ball.

    Example:
        >>> WorstCase(rho=0.05, m=128)(Problem(model, criterion, (inputs, targets))).value
    """

    rho: float
    norm: Norm = "l2"
    adaptive: bool = False
    m: int | None = 128
    steps: int = 20
    starts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.rho, self.norm, self.m)
        checks.positive_integer("steps", self.steps)
        checks.positive_integer("starts", self.starts)

    def __call__(self, problem: Problem) -> Sharpness:
        """Return the sharpness of ``problem``."""
        generator = torch.Generator().manual_seed(self.seed)
        return _over_subsets(problem, self.m, Ball(self.norm, self.adaptive), lambda s: self._rise(s, generator))

    def _rise(self, surface: Surface, generator: torch.Generator) -> list[float]:
        here, g = surface.climb(None)
        best = here
        for i in range(self.starts):
            start = None if i == 0 and g.norm() > 0 else self._random(surface, generator)
            best = max(best, *auto_pgd(surface, start, self.rho, self.steps))
        return [best - here]

    def _random(self, surface: Surface, generator: torch.Generator) -> Vector:
        z = surface.ball.draw(surface.problem.parameters, generator)
        return surface.ball.project(z * (self.rho / float(z.norm())) if self.norm == "l2" else self.rho * z, self.rho)


@dataclass(frozen=True)
class AverageCase:
    """``mean over subsets S and draws eps of L_S(w + eps) - L_S(w)``, ``eps_j ~ N(0, rho^2 T_jj^2)``.

    With ``norm="linf"`` ``eps_j`` is uniform in ``[-rho T_jj, rho T_jj]``. ``T`` as in :class:`WorstCase`. At a
    critical point, to second order, ``rho^2 / 2 sum_j T_jj^2 H_jj`` (a third of it for the uniform).

    Args:
        rho: the standard deviation, or the half width, of each coordinate where ``T`` is the identity.
        norm: ``"l2"`` for Gaussian draws, ``"linf"`` for uniform ones.
        adaptive: as in :class:`WorstCase`.
        m: examples that share their draws; ``None`` is all of them.
        draws: number of draws for each subset.
        seed: seed of the draws.
    """

    rho: float
    norm: Norm = "l2"
    adaptive: bool = False
    m: int | None = 128
    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.rho, self.norm, self.m)
        checks.positive_integer("draws", self.draws)

    def __call__(self, problem: Problem) -> Sharpness:
        """Return the sharpness of ``problem``."""
        generator = torch.Generator().manual_seed(self.seed)

        def rises(surface: Surface) -> list[float]:
            here, like = surface.loss(None), surface.problem.parameters
            draws = (self.rho * surface.ball.draw(like, generator) for _ in range(self.draws))
            return [surface.loss(eps) - here for eps in draws]

        return _over_subsets(problem, self.m, Ball(self.norm, self.adaptive), rises)


PUBLISHED_EXAMPLES = 1024


def published(problem: Problem, measure: WorstCase | AverageCase) -> Sharpness:
    """Return the sharpness by the protocol of Andriushchenko et al. 2023 (arXiv 2302.07011).

    The first 1,024 training examples in subsets of ``m = 128``, normalisation in evaluation mode, 20 steps of Auto-PGD
    from ``w`` with a first step of 2 rho, or 20 draws. The measures' defaults are these; this function sets examples
    and mode. Two things differ from the authors' code (tml-epfl/sharpness-vs-generalization): their adaptive l2 step
    goes along ``abs(w) * g / norm(g)`` where ours is the steepest, and their option to normalise logits is left to the
    model. Their radii for ResNets are 0.05 to 0.4 (average, l2), 0.1 to 0.8 (average, linf), 0.25 to 2 (worst, l2) and
    5e-4 to 8e-3 (worst, linf).

    Example:
        >>> published(problem, WorstCase(rho=0.5, adaptive=True)).value
    """
    return measure(problem.first(PUBLISHED_EXAMPLES).in_mode("eval"))


def _over_subsets(problem: Problem, m: int | None, ball: Ball, rises_of: Callable[[Surface], list[float]]) -> Sharpness:
    rises: list[float] = []
    total, passes = 0.0, 0
    for part in [problem] if m is None else problem.split(m):
        with part.untouched():
            surface = Surface(part, ball)
            found = rises_of(surface)
        rises += found
        total += part.n / problem.n * sum(found) / len(found)
        passes += surface.passes
    return Sharpness(total, mean_and_error(rises)[1], tuple(rises), passes)


def _check(rho: float, norm: str, m: int | None) -> None:
    checks.non_negative("rho", rho)
    if norm not in ("l2", "linf"):
        raise ValueError(f'norm must be "l2" or "linf", got {norm!r}')
    if m is not None:
        checks.positive_integer("m", m)
