"""Minima, saddles and maxima of a landscape, and the one that a trajectory has reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.toy.landscape import Landscape

if TYPE_CHECKING:
    import numpy as np

GRID = 9  # starts of the search on each axis
SAME = 1e-4  # roots closer than this share of the window's diagonal are one


@dataclass(frozen=True)
class Stationary:
    """A point where the gradient is zero."""

    name: str
    kind: str  # minimum, saddle, maximum; degenerate where an eigenvalue is zero
    point: tuple[float, float]
    loss: float
    eigenvalues: tuple[float, float]  # of the Hessian, ascending


def stationary_points(landscape: Landscape) -> list[Stationary]:
    """Return the stationary points in the window, minima first, by their loss. Needs SciPy.

    They are roots of the gradient, searched from a grid of starts. Two minima are named sharp and flat by their largest
    eigenvalue; more are numbered.
    """
    found: list[Stationary] = []
    for x in torch.linspace(*landscape.x, GRID + 2, dtype=torch.float64)[1:-1]:
        for y in torch.linspace(*landscape.y, GRID + 2, dtype=torch.float64)[1:-1]:
            point = _solve(landscape, torch.stack([x, y]))
            if point is not None and all(math.dist(point.tolist(), s.point) > SAME * landscape.diagonal for s in found):
                found.append(_classified(landscape, point))
    named: list[Stationary] = []
    for kind in ("minimum", "saddle", "maximum", "degenerate point"):
        same = sorted((s for s in found if s.kind == kind), key=lambda s: s.loss)
        names = [f"{kind} {i}" for i in range(1, len(same) + 1)] if len(same) > 1 else [kind]
        if kind == "minimum" and len(same) == 2:
            names = ["sharp minimum", "flat minimum"]
            if same[0].eigenvalues[1] < same[1].eigenvalues[1]:
                names.reverse()
        named += [replace(s, name=name) for s, name in zip(same, names, strict=False)]
    return named


def place(landscape: Landscape, end: Tensor, points: Sequence[Stationary]) -> str:
    """Return the place of ``end`` in words: a stationary point, the basin of a minimum, or no minimum. Needs SciPy.

    ``end`` is at the nearest stationary point if that is within rho, because a normalised perturbation keeps moving
    around a minimum by about rho. Else it is in the basin of the minimum to which the flow ``dx/dt = -grad L`` leads.
    """
    near = min(points, key=lambda s: math.dist(end.tolist(), s.point), default=None)
    if near is not None and math.dist(end.tolist(), near.point) <= landscape.rho:
        return near.name
    bottom = _bottom(landscape, end).tolist()
    minima = [s for s in points if s.kind == "minimum" and math.dist(bottom, s.point) < 1e-2 * landscape.diagonal]
    return f"basin of the {minima[0].name}" if minima else "no minimum in the window"


def eigenvalues(landscape: Landscape, point: Tensor) -> tuple[float, float]:
    """Return the Hessian's eigenvalues at ``point``, ascending."""
    low, high = torch.linalg.eigvalsh(landscape.hessian(point)).tolist()
    return low, high


def _solve(landscape: Landscape, start: Tensor) -> Tensor | None:
    """Return the root of the gradient found from ``start``, if it is in the window."""
    from scipy.optimize import root

    def gradient(at: np.ndarray) -> np.ndarray:
        return landscape.gradient(torch.tensor(at)).nan_to_num(1e6).numpy()

    def hessian(at: np.ndarray) -> np.ndarray:
        return landscape.hessian(torch.tensor(at)).nan_to_num(0.0).numpy()

    result = root(gradient, start.numpy(), jac=hessian, options={"xtol": 1e-12})
    inside = all(low <= v <= high for v, (low, high) in zip(result.x, (landscape.x, landscape.y), strict=True))
    at_start = landscape.gradient(torch.tensor(landscape.start, dtype=torch.float64))
    scale = float(at_start.nan_to_num(1e6).abs().max()) + abs(hessian(result.x)).max()
    return torch.tensor(result.x) if inside and abs(result.fun).max() < 1e-9 * scale else None


def _classified(landscape: Landscape, point: Tensor) -> Stationary:
    low, high = eigenvalues(landscape, point)
    if min(abs(low), abs(high)) <= 1e-9 * max(abs(low), abs(high)):
        kind = "degenerate point"
    else:
        kind = "minimum" if low > 0 else "saddle" if high > 0 else "maximum"
    x, y = point.tolist()
    return Stationary(kind, kind, (x, y), landscape.value(point), (low, high))


def _bottom(landscape: Landscape, start: Tensor) -> Tensor:
    """Return the end of steepest descent in continuous time; infinite if the integration fails."""
    from scipy.integrate import solve_ivp

    scale = float(landscape.gradient(start).norm())
    if scale == 0:
        return start

    def downhill(t: float, at: np.ndarray) -> np.ndarray:
        return -landscape.gradient(torch.tensor(at)).nan_to_num(0.0).numpy() / scale

    result = solve_ivp(downhill, (0, 1e4 * landscape.diagonal), start.numpy(), method="LSODA", rtol=1e-6, atol=1e-9)
    return torch.tensor(result.y[:, -1] if result.success else (math.inf, math.inf))
