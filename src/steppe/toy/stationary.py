"""Minima, saddles and maxima of a landscape, and which of them a trajectory has come to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import root
from torch import Tensor

from steppe.toy.landscape import Landscape

GRID = 9  # starts of the search on each axis
SAME = 1e-4  # of the window's diagonal: roots closer than that are one


@dataclass(frozen=True)
class Stationary:
    """A point where the gradient is zero."""

    name: str
    kind: str  # minimum, saddle, maximum; degenerate where an eigenvalue is zero
    point: tuple[float, float]
    loss: float
    eigenvalues: tuple[float, float]  # of the Hessian, ascending


@dataclass(frozen=True)
class Place:
    """Where a trajectory ended: at a stationary point (within rho), or in the basin of a minimum, or in none."""

    where: Stationary | None
    there: bool  # within rho of it

    def __str__(self) -> str:
        if self.where is None:
            return "no minimum in the window"
        return self.where.name if self.there else f"basin of the {self.where.name}"


def stationary_points(landscape: Landscape) -> list[Stationary]:
    """The stationary points in the window: roots of the gradient from a grid of starts; minima first, by their loss.

    Two minima are called sharp and flat by their largest eigenvalue; other numbers of them are counted.
    """
    found: list[Stationary] = []
    for x in np.linspace(*landscape.x, GRID + 2)[1:-1]:
        for y in np.linspace(*landscape.y, GRID + 2)[1:-1]:
            point = _solve(landscape, x, y)
            if point is not None and all(_distance(point, s.point) > SAME * landscape.diagonal for s in found):
                found.append(_classified(landscape, point))
    return _named(found)


def place(landscape: Landscape, end: Tensor, points: Sequence[Stationary]) -> Place:
    """Where ``end`` is: at the nearest stationary point if that is within rho, else in the basin that the flow
    ``dx/dt = -grad L`` from there leads to. (A normalised perturbation keeps moving about a minimum by some rho.)"""
    near = min(points, key=lambda s: _distance(end, s.point), default=None)
    if near is not None and _distance(end, near.point) <= landscape.rho:
        return Place(near, there=True)
    minima = [s for s in points if s.kind == "minimum"]
    bottom = _flow(landscape, end)
    reached = [s for s in minima if bottom is not None and _distance(bottom, s.point) < 1e-2 * landscape.diagonal]
    return Place(reached[0] if reached else None, there=False)


def eigenvalues(landscape: Landscape, point: Tensor) -> tuple[float, float]:
    """The Hessian's eigenvalues at ``point``, ascending."""
    low, high = torch.linalg.eigvalsh(landscape.hessian(point)).tolist()
    return low, high


def _solve(landscape: Landscape, x: float, y: float) -> Tensor | None:
    """The root of the gradient that the search from ``(x, y)`` finds in the window, if any."""

    def gradient(at: np.ndarray) -> np.ndarray:
        return landscape.gradient(torch.tensor(at)).nan_to_num(1e6).numpy()

    def hessian(at: np.ndarray) -> np.ndarray:
        return landscape.hessian(torch.tensor(at)).nan_to_num(0.0).numpy()

    result = root(gradient, np.array([x, y]), jac=hessian, options={"xtol": 1e-12})
    inside = all(low <= v <= high for v, (low, high) in zip(result.x, (landscape.x, landscape.y), strict=True))
    scale = np.abs(gradient(np.array(landscape.start))).max() + np.abs(hessian(result.x)).max()
    return torch.tensor(result.x) if inside and np.abs(result.fun).max() < 1e-9 * scale else None


def _classified(landscape: Landscape, point: Tensor) -> Stationary:
    low, high = eigenvalues(landscape, point)
    if min(abs(low), abs(high)) <= 1e-9 * max(abs(low), abs(high)):
        kind = "degenerate point"
    else:
        kind = "minimum" if low > 0 else "saddle" if high > 0 else "maximum"
    x, y = point.tolist()
    return Stationary(kind, kind, (x, y), landscape.value(point), (low, high))


def _named(found: list[Stationary]) -> list[Stationary]:
    named: list[Stationary] = []
    for kind in ("minimum", "saddle", "maximum", "degenerate point"):
        same = sorted((s for s in found if s.kind == kind), key=lambda s: s.loss)
        if kind == "minimum" and len(same) == 2:
            sharper = max(same, key=lambda s: s.eigenvalues[1])
            named += [replace(s, name="sharp minimum" if s is sharper else "flat minimum") for s in same]
        else:
            named += [replace(s, name=f"{kind} {i}" if len(same) > 1 else kind) for i, s in enumerate(same, 1)]
    return named


def _flow(landscape: Landscape, start: Tensor) -> Tensor | None:
    """Where steepest descent in continuous time comes to rest; ``None`` where it does not."""
    scale = float(landscape.gradient(start).norm())
    if scale == 0:
        return start

    def downhill(t: float, at: np.ndarray) -> np.ndarray:
        return -landscape.gradient(torch.tensor(at)).nan_to_num(0.0).numpy() / scale

    result = solve_ivp(downhill, (0, 1e4 * landscape.diagonal), start.numpy(), method="LSODA", rtol=1e-6, atol=1e-9)
    return torch.tensor(result.y[:, -1]) if result.success else None


def _distance(a: Tensor | tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.hypot(float(a[0]) - b[0], float(a[1]) - b[1]))
