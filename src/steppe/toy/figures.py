"""Figures of trajectories on a landscape. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steppe.engine.vector import TINY
from steppe.toy.landscape import Landscape
from steppe.toy.stationary import Stationary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 100  # of the contours, along each axis
MARKS = {"minimum": "*", "saddle": "X", "maximum": "^"}
# distinct to colour-blind readers
COLORS = ("#444444", "#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")


def trajectories(landscape: Landscape, paths: Mapping[str, Tensor], points: Sequence[Stationary], title: str) -> Figure:
    """Return the contours with every path and the stationary points; decoupled WSAM is dashed."""
    figure, axis = _figure(9, 5.6)
    _contours(figure, axis, landscape)
    _draw(axis, paths)
    axis.plot(*landscape.start, "s", color="black", markersize=7, label="start", zorder=5)
    axis.plot([], [], "o", color="grey", label=f"after {landscape.steps} steps")
    for kind, mark in MARKS.items():
        if same := [s.point for s in points if s.kind == kind]:
            xs, ys = zip(*same, strict=True)
            axis.plot(xs, ys, mark, color="white", markeredgecolor="black", markersize=14, label=kind, zorder=3)
    for s in points:
        axis.annotate(s.name, s.point, (0, -17), textcoords="offset points", ha="center", fontsize=9, zorder=6)
    axis.set(xlim=landscape.x, ylim=landscape.y, xlabel=landscape.axes[0], ylabel=landscape.axes[1], title=title)
    if landscape.zoom is not None:  # enlarge the part of the window where the paths lie close together
        xlim, ylim = landscape.zoom
        inset = axis.inset_axes((0.45, 0.02, 0.53, 0.4), xlim=xlim, ylim=ylim, xticks=[], yticks=[])
        inset.set_facecolor("#f4f4f4")
        _draw(inset, paths)
        inset.plot(*landscape.start, "s", color="black", markersize=7)
        axis.indicate_inset_zoom(inset, edgecolor="black")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def update(landscape: Landscape, gammas: Sequence[float]) -> Figure:
    """Return WSAM's Figure 1: the update at the start as a function of gamma.

    Every update ``-(g + gamma / (1 - gamma) (g_adv - g))`` ends on the line through ``-g`` (gamma 0) and ``-g_adv``
    (gamma 1/2, SAM); above 1/2 it lies beyond SAM's.
    """
    point = torch.tensor(landscape.start, dtype=torch.float64)
    g = landscape.gradient(point)
    g_adv = landscape.gradient(point + landscape.rho * g / (g.norm() + TINY))
    figure, axis = _figure(5.6, 4.8)
    named = {0.0: ("0: -g, the base's", COLORS[0]), 0.5: ("0.5: -g_adv, SAM's", COLORS[1])}
    for gamma in (0.0, 0.5, *gammas):
        x, y = (-(g + gamma / (1 - gamma) * (g_adv - g))).tolist()
        name, color = named.get(gamma, (f"{gamma:g}", COLORS[3]))
        axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0})
        align = "right" if x < 0 else "left"
        axis.plot((0, x), (0, y), color=color)  # arrows do not widen the axes
        axis.text(x, y, f" gamma {name} ", color=color, horizontalalignment=align, verticalalignment="center")
    axis.plot(0, 0, "s", color="black")  # w
    axis.margins(x=0.35, y=0.1)
    axis.set_aspect("equal", adjustable="datalim")
    x, y = landscape.start
    axis.set(xlabel=f"along {landscape.axes[0]}", ylabel=f"along {landscape.axes[1]}")
    axis.set_title(f"WSAM's update by gamma\nat w = ({x:.3g}, {y:.3g}), rho {landscape.rho:g}", fontsize=11)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    return figure, figure.subplots()


def _draw(axis: Axes, paths: Mapping[str, Tensor]) -> None:
    for i, (name, path) in enumerate(paths.items()):
        color, style = COLORS[i % len(COLORS)], "--" if name.startswith("decoupled") else "-"
        x, y = path.T.numpy()
        axis.plot(x, y, style, color=color, linewidth=1.8, label=name)
        axis.plot(x[-1], y[-1], "o", color=color, markersize=6, markeredgecolor="white", zorder=4)


def _contours(figure: Figure, axis: Axes, landscape: Landscape) -> None:
    import numpy as np
    from matplotlib.colors import PowerNorm

    x, y = np.linspace(*landscape.x, CELLS), np.linspace(*landscape.y, CELLS)
    rows = [[landscape.value(torch.tensor([a, b], dtype=torch.float64)) for a in x] for b in y]
    values = np.ma.masked_invalid(np.array(rows))
    low, high = values.min(), np.percentile(values.compressed(), 95)
    levels = low + (high - low) * np.linspace(0, 1, 26) ** 2  # dense near the bottom
    shown = axis.contourf(x, y, values, levels, cmap="Greys_r", norm=PowerNorm(0.5, low, high), extend="max", alpha=0.7)
    axis.contour(x, y, values, levels, colors="white", linewidths=0.4)
    figure.colorbar(shown, ax=axis, label="loss", shrink=0.6, format="%.3g", ticks=levels[::5], location="right")
