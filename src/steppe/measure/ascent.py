"""Ascent of a loss in a ball of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.engine.vector import TINY, Vector, wide
from steppe.measure.krylov import gaussian, uniform
from steppe.measure.problem import Problem

MOMENTUM = 0.75  # of Auto-PGD (arXiv 2003.01690)
ENOUGH = 0.75  # the step size stays if this share of the steps has risen


@dataclass(frozen=True)
class Ball:
    """``norm(T^-1 eps)_p <= rho``, ``p`` 2 or infinity, ``T = diag(abs(w))`` where adaptive, else the identity.

    In the coordinates ``u = T^-1 eps`` it is a plain ball. Its steepest unit step is ``T g / norm(T g)`` for ``p = 2``
    and ``sign(T g)`` for infinity.
    """

    norm: str
    adaptive: bool

    def scale(self, parameters: Sequence[Tensor]) -> Callable[[Vector], Vector]:
        """Return ``T`` at the parameters' present values."""
        T = Vector([wide(p.detach()).abs() for p in parameters])
        return lambda v: v * T if self.adaptive else v

    def steepest(self, Tg: Vector) -> Vector:
        """Return the unit step along which a linear function with gradient ``T g`` rises most."""
        return 1 / (Tg.norm() + TINY) * Tg if self.norm == "l2" else Tg.map(torch.sign)

    def project(self, u: Vector, rho: float) -> Vector:
        """Return the nearest point of the ball."""
        if self.norm == "l2":
            return u * min(1.0, rho / max(float(u.norm()), 1e-30))
        return u.map(lambda t: t.clamp(-rho, rho))

    def draw(self, like: Sequence[Tensor], generator: torch.Generator) -> Vector:
        """Return a draw of the published average case: ``N(0, I)``, or uniform in the cube of half width 1."""
        return (gaussian if self.norm == "l2" else uniform)(like, generator)


class Surface:
    """The loss around ``w`` in the coordinates ``u`` of a ball."""

    def __init__(self, problem: Problem, ball: Ball) -> None:
        self.problem, self.ball = problem, ball
        self.f, self.T = problem.oracle(self._backward), ball.scale(problem.parameters)
        self.passes = 0

    def loss(self, u: Vector | None) -> float:
        """Return ``L(w + T u)`` by a forward pass; ``None`` is ``u = 0``."""
        self.passes += 1
        with self._at(u):
            return self._finite(self.problem.mean_loss(), u)

    def climb(self, u: Vector | None) -> tuple[float, Vector]:
        """Return ``L(w + T u)`` and its gradient in ``u``, ``T g``, by a forward and a backward pass."""
        self.passes += 1
        with self._at(u):
            g = self.f.grad()
        return self._finite(float(self._loss), u), self.T(g)

    def _backward(self) -> Tensor:
        self._loss = self.problem.backward()
        return self._loss

    def _at(self, u: Vector | None) -> AbstractContextManager[None]:
        return nullcontext() if u is None else self.f.at(self.T(u))

    def _finite(self, loss: float, u: Vector | None) -> float:
        if not math.isfinite(loss):
            where = "w" if u is None else f"distance {float(u.norm()):.3g} from w"
            raise FloatingPointError(f"the loss at {where} is {loss}: choose a smaller rho")
        return loss


def auto_pgd(surface: Surface, start: Vector | None, rho: float, steps: int) -> Iterator[float]:
    """Auto-PGD (Croce and Hein 2020, arXiv 2003.01690, algorithm 1): yield the loss at every point visited.

    ``z = P(u_k + a s_k)``, ``u_{k+1} = P(u_k + 0.75 (z - u_k) + 0.25 (u_k - u_{k-1}))``, ``s`` the steepest unit step,
    ``a`` at first 2 rho. At checkpoints of shrinking distance, ``a`` is halved and the ascent continues from the best
    point if fewer than 3/4 of the steps since the last one rose, or if neither ``a`` nor the best loss has changed.
    """
    ball, step, marks = surface.ball, 2 * rho, checkpoints(steps)
    u, before = start, None
    loss, g = surface.climb(u)
    yield loss
    best, best_u, best_g = loss, u, g
    rises, last, halved, best_then = 0, 0, True, loss
    for k in range(1, steps + 1):
        here = 0.0 * g if u is None else u
        z = ball.project(here + step * ball.steepest(g), rho)
        onward = (
            z if before is None else ball.project(here + MOMENTUM * (z - here) + (1 - MOMENTUM) * (here - before), rho)
        )
        before, u = here, onward
        old, (loss, g) = loss, surface.climb(u)
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
