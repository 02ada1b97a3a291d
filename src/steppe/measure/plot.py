"""Pictures of lines and planes. Needs matplotlib: ``pip install "steppe[measure]"``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steppe.measure.landscape import Line, Plane

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def png(what: dict[str, Line] | Plane, path: Path | str, x: str = "t", y: str = "loss") -> None:
    """Draw several lines, by name, or a plane's contours into a PNG file; ``x`` and ``y`` name the axes.

    Example:
        >>> png({"SGD": line(problem, d, t)}, "slice.png", x="along d")
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    if isinstance(what, Plane):
        _contours(figure, axes, what)
    else:
        for name, each in what.items():
            axes.plot(each.t, each.loss, label=name)
        axes.legend()
    figure.savefig(path, format="png")


def _contours(figure: Figure, axes: Axes, plane: Plane) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    loss = np.ma.masked_invalid(np.array(plane.loss))
    low, high = max(float(loss.min()), 1e-12), float(loss.max())
    levels, z = np.geomspace(low, max(high, low * 1.001), 24), np.maximum(loss, low)
    drawn = axes.contourf(plane.x, plane.y, z, levels=levels, norm=LogNorm(), cmap="viridis")
    axes.contour(plane.x, plane.y, z, levels=levels[::3], colors="white", linewidths=0.4)
    axes.plot(0, 0, "+", color="white", markersize=10)
    bar = figure.colorbar(drawn, ax=axes, label="loss")
    ticks = levels[:: max(1, len(levels) // 5)]
    bar.set_ticks(ticks.tolist(), labels=[f"{t:.3g}" for t in ticks])
