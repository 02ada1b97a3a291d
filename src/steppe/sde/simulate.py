"""Paths of an equation, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import vmap

from steppe.sde.equation import Equation
from steppe.sde.problem import SDEError

Progress = Callable[[int, int], None]  # (steps done, steps in all)


def simulate(
    equation: Equation, x: Tensor, time: float, steps: int, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Euler-Maruyama, ``X <- X + b(X) h + sigma(X) dW`` with ``h = time / steps``: yields the paths after every step.

    Args:
        equation: drift and diffusion.
        x: where the paths begin, shape ``(paths, d)``.
        time: how long; the scheme's step ``k`` is at time ``k lr``.
        steps: into how many.
        generator: of the Brownian increments.

    Raises:
        SDEError: a path ceases to be finite; the message names the step.

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
    """One step ``(X, h, dW) -> X + b(X) h + sigma(X) dW`` for all paths."""
    coefficients = vmap(equation.coefficients)

    def move(x: Tensor, h: float, dW: Tensor) -> Tensor:
        b, sigma = coefficients(x)
        end: Tensor = x + h * b + torch.einsum("pdr,pr->pd", sigma, dW)
        return end

    return move


def require_finite(x: Tensor, what: str) -> None:
    """Raise where any path is not finite."""
    bad = int((~x.isfinite().all(-1)).sum())
    if bad:
        raise SDEError(f"{what} are not finite in {bad} of {len(x)}: lower lr or rho, or begin elsewhere")
