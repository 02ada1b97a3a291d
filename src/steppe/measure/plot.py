"""Pictures of lines and planes. Needs the extra ``pip install "steppe[measure]"``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.measure.landscape import Line, Plane

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Named = dict[str, Line]  # several lines in one picture, by name


def png(what: Named | Plane, path: Path | str, x: str = "t", y: str = "loss") -> None:
    """Draw lines, or a plane's contours, into a PNG file; ``x`` and ``y`` name the axes.

    Example:
        >>> png({"SGD": line(problem, d, t)}, "slice.png", x="along d")
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    if isinstance(what, Plane):
        _contours(figure, what, x, y)
    else:
        axes = figure.add_subplot(xlabel=x, ylabel=y)
        for name, each in what.items():
            axes.plot(each.t, each.loss, label=name)
        axes.legend()
    figure.savefig(path, format="png")


def _contours(figure: Figure, plane: Plane, x: str, y: str) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm

    axes = figure.add_subplot(xlabel=x, ylabel=y)
    loss = np.ma.masked_invalid(np.array(plane.loss))
    low, high = max(float(loss.min()), 1e-12), float(loss.max())
    levels = np.geomspace(low, max(high, low * 1.001), 24)
    drawn = axes.contourf(plane.x, plane.y, np.maximum(loss, low), levels=levels, norm=LogNorm(), cmap="viridis")
    axes.contour(plane.x, plane.y, np.maximum(loss, low), levels=levels[::3], colors="white", linewidths=0.4)
    axes.plot(0, 0, "+", color="white", markersize=10)
    bar = figure.colorbar(drawn, ax=axes, label="loss")
    ticks = levels[:: max(1, len(levels) // 5)]
    bar.set_ticks(ticks.tolist(), labels=[f"{t:.3g}" for t in ticks])


def html(what: Named | Plane, path: Path | str, x: str = "t", y: str = "loss") -> None:
    """Write an interactive, self-contained page: lines, or a plane as a surface that can be turned."""
    from plotly.graph_objects import Figure

    Figure(*traces(what, x, y)).write_html(path, include_plotlyjs=True)


def traces(what: Named | Plane, x: str = "t", y: str = "loss") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return data and layout for plotly, as plain data fit for JSON; losses that are not finite become ``None``."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    if isinstance(what, Plane):
        hover = "%{x:.3g}, %{y:.3g}<br>loss %{z:.4g}<extra></extra>"
        data = {"x": what.x, "y": what.y, "z": [_finite(row) for row in what.loss]}
        surface = {"type": "surface", **data, "hovertemplate": hover, "colorscale": "Viridis"}
        return [surface], {"scene": axes | {"zaxis": {"title": {"text": "loss"}}}}
    style = {"type": "scatter", "mode": "lines"}
    return [{**style, "name": name, "x": each.t, "y": _finite(each.loss)} for name, each in what.items()], axes


def _finite(losses: tuple[float, ...]) -> list[float | None]:
    return [loss if math.isfinite(loss) else None for loss in losses]
