"""The rise of the loss in a ball around the weights: worst case, average case, m-sharpness."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.vector import TINY, Vector, wide
from steppe.measure.krylov import gaussian, uniform
from steppe.measure.problem import Problem
from steppe.measure.trace import mean_and_error

Norm = Literal["l2", "linf"]
MOMENTUM = 0.75  # of Auto-PGD (arXiv 2003.01690)
ENOUGH = 0.75  # the step size stays if this share of the steps has risen


@dataclass(frozen=True)
class Sharpness:
    """A rise of the loss, averaged over disjoint subsets of the examples, weighted by their sizes.

    ``error`` is the standard error over subsets (and draws), infinite for a single one; ``rises`` has each of them in
    order; ``passes`` counts passes over a subset.
    """

    value: float
    error: float
    rises: tuple[float, ...]
    passes: int


@dataclass(frozen=True)
class _InBall:
    rho: float
    norm: Norm = "l2"
    adaptive: bool = False
    m: int | None = 128

    def __post_init__(self) -> None:
        checks.non_negative("rho", self.rho)
        if self.norm not in ("l2", "linf"):
            raise ValueError(f'norm must be "l2" or "linf", got {self.norm!r}')
        if self.m is not None:
            checks.positive_integer("m", self.m)

    def _over_subsets(self, problem: Problem, rises_of: Callable[["_Ball"], list[float]]) -> Sharpness:
        rises: list[float] = []
        total, passes = 0.0, 0
        for part in [problem] if self.m is None else problem.split(self.m):
            with part.untouched():
                ball = _Ball(part, self.norm, self.adaptive)
                found = rises_of(ball)
            rises += found
            total += part.n / problem.n * sum(found) / len(found)
            passes += ball.passes
        return Sharpness(total, mean_and_error(rises)[1], tuple(rises), passes)


@dataclass(frozen=True)
class WorstCase(_InBall):
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

    steps: int = 20
    starts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer("steps", self.steps)
        checks.positive_integer("starts", self.starts)

    def __call__(self, problem: Problem) -> Sharpness:
        """Return the sharpness of ``problem``."""
        generator = torch.Generator().manual_seed(self.seed)

        def rise(ball: _Ball) -> list[float]:
            here, g = ball.climb(None)
            best = here
            for i in range(self.starts):
                start = None if i == 0 and g.norm() > 0 else ball.on_sphere(self.rho, generator)
                best = max(best, *_auto_pgd(ball, start, self.rho, self.steps))
            return [best - here]

        return self._over_subsets(problem, rise)


@dataclass(frozen=True)
class AverageCase(_InBall):
    """``mean over subsets S and draws eps of L_S(w + eps) - L_S(w)``, ``eps_j ~ N(0, rho^2 T_jj^2)``.

    With ``norm="linf"`` ``eps_j`` is uniform in ``[-rho T_jj, rho T_jj]``. ``T`` as in :class:`WorstCase`. At a
    critical point, to second order, ``rho^2 / 2 sum_j T_jj^2 H_jj`` (a third of it for the uniform).

    Args:
        rho: the standard deviation, or the half width, of each coordinate where ``T`` is the identity.
        norm: ``"l2"`` for Gaussian draws, ``"linf"`` for uniform ones.
        adaptive, m, seed: as in :class:`WorstCase`; a subset's examples share its draws.
        draws: number of draws for each subset.
    """

    draws: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive_integer("draws", self.draws)

    def __call__(self, problem: Problem) -> Sharpness:
        """Return the sharpness of ``problem``."""
        generator = torch.Generator().manual_seed(self.seed)

        def rises(ball: _Ball) -> list[float]:
            here = ball.loss(None)
            return [ball.loss(self.rho * ball.draw(generator)) - here for _ in range(self.draws)]

        return self._over_subsets(problem, rises)


def published(problem: Problem, measure: WorstCase | AverageCase) -> Sharpness:
    """Return the sharpness by the protocol of Andriushchenko et al. 2023 (arXiv 2302.07011).

    The first 1,024 training examples in evaluation mode; the rest of it is the measures' defaults. ``docs/measure.md``
    says where the authors' code differs, and has their radii.

    Args:
        problem: model, loss and the training data.
        measure: radius and norm of the ball.

    Example:
        >>> published(problem, WorstCase(rho=0.5, adaptive=True)).value
    """
    chosen = problem.first(1024)
    chosen.mode = "eval"
    return measure(chosen)


class _Ball:
    """The loss ``L(w + T u)`` in the coordinates ``u = T^-1 eps``, where ``norm(T^-1 eps)_p <= rho`` is a plain ball.

    ``u = None`` is 0. :meth:`climb` also returns the gradient in ``u``, ``T g``. ``passes`` counts calls of both.
    """

    def __init__(self, problem: Problem, norm: Norm, adaptive: bool) -> None:
        self.problem, self.norm, self.passes = problem, norm, 0
        self.f = problem.oracle(self._backward)
        sizes = Vector([wide(p.detach()).abs() for p in problem.parameters])
        self.T: Callable[[Vector], Vector] = lambda v: v * sizes if adaptive else v

    def loss(self, u: Vector | None) -> float:
        self.passes += 1
        with nullcontext() if u is None else self.f.at(self.T(u)):
            return self._finite(self.problem.mean_loss(), u)

    def climb(self, u: Vector | None) -> tuple[float, Vector]:
        self.passes += 1
        with nullcontext() if u is None else self.f.at(self.T(u)):
            g = self.f.grad()
        return self._finite(float(self._loss), u), self.T(g)

    def steepest(self, Tg: Vector) -> Vector:
        """Return the unit step along which a linear function with gradient ``T g`` rises most."""
        return 1 / (Tg.norm() + TINY) * Tg if self.norm == "l2" else Tg.map(torch.sign)

    def project(self, u: Vector, rho: float) -> Vector:
        if self.norm == "l2":
            return u * min(1.0, rho / max(float(u.norm()), 1e-30))
        return u.map(lambda t: t.clamp(-rho, rho))

    def draw(self, generator: torch.Generator) -> Vector:
        """Return a draw of the average case of radius 1: ``N(0, I)``, or uniform in the cube of half width 1."""
        return (gaussian if self.norm == "l2" else uniform)(self.problem.parameters, generator)

    def on_sphere(self, rho: float, generator: torch.Generator) -> Vector:
        """Return a random start: of length ``rho`` for l2, else uniform in the cube."""
        z = self.draw(generator)
        return self.project(z * (rho / float(z.norm())) if self.norm == "l2" else rho * z, rho)

    def _backward(self) -> Tensor:
        self._loss = self.problem.backward()
        return self._loss

    def _finite(self, loss: float, u: Vector | None) -> float:
        if not math.isfinite(loss):
            where = "w" if u is None else f"distance {float(u.norm()):.3g} from w"
            raise FloatingPointError(f"the loss at {where} is {loss}: choose a smaller rho")
        return loss


def _auto_pgd(ball: _Ball, u: Vector | None, rho: float, steps: int) -> Iterator[float]:
    """Auto-PGD (Croce and Hein 2020, arXiv 2003.01690, algorithm 1): yield the loss at every point visited.

    ``z = P(u_k + a s_k)``, ``u_{k+1} = P(u_k + 0.75 (z - u_k) + 0.25 (u_k - u_{k-1}))``, ``s`` the steepest unit step,
    ``a`` at first 2 rho. At checkpoints of shrinking distance, ``a`` is halved and the ascent continues from the best
    point if fewer than 3/4 of the steps since the last one rose, or if neither ``a`` nor the best loss has changed.
    """
    step, marks, before = 2 * rho, checkpoints(steps), None
    loss, g = ball.climb(u)
    yield loss
    best, best_u, best_g = loss, u, g
    rises, last, halved, best_then = 0, 0, True, loss
    for k in range(1, steps + 1):
        here = 0.0 * g if u is None else u
        onward = ball.project(here + step * ball.steepest(g), rho)
        if before is not None:
            onward = ball.project(here + MOMENTUM * (onward - here) + (1 - MOMENTUM) * (here - before), rho)
        before, u = here, onward
        old, (loss, g) = loss, ball.climb(u)
        yield loss
        rises += loss > old
        if loss > best:
            best, best_u, best_g = loss, u, g
        if k in marks:
            halve = rises < ENOUGH * (k - last) or (not halved and best == best_then)
            if halve:
                step, u, loss, g = step / 2, best_u, best, best_g
            rises, last, halved, best_then = 0, k, halve, best


def checkpoints(steps: int) -> set[int]:
    """Return all ``ceil(p_j steps)``: ``p_0 = 0``, ``p_1 = 0.22``, then intervals that shrink by 0.03 down to 0.06."""
    p, marks = [0.0, 0.22], set()
    while p[-1] <= 1:
        marks.add(math.ceil(p[-1] * steps - 1e-9))  # 0.57 * 100 is above 57
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return marks
