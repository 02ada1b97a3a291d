"""Lines and planes as pictures. Needs the extra `pip install "steppe[measure]"`."""

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


def traces(what: Named | Plane, x: str = "t", y: str = "loss") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Data and layout for plotly, as plain data: what the laboratory's report embeds."""
    layout: dict[str, Any] = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    if isinstance(what, Plane):
        loss = [[value if math.isfinite(value) else None for value in row] for row in what.loss]
        text = {"x": x, "y": y}
        hover = "%{x:.3g}, %{y:.3g}<br>loss %{z:.4g}<extra></extra>"
        scene = {f"{axis}axis": {"title": {"text": name}} for axis, name in text.items()}
        surface = {
            "type": "surface",
            "x": what.x,
            "y": what.y,
            "z": loss,
            "hovertemplate": hover,
            "colorscale": "Viridis",
        }
        return [surface], {"scene": scene | {"zaxis": {"title": {"text": "loss"}}}}
    data = [
        {"type": "scatter", "mode": "lines", "name": name, "x": each.t, "y": [_finite(v) for v in each.loss]}
        for name, each in what.items()
    ]
    return data, layout


def html(what: Named | Plane, path: Path | str, x: str = "t", y: str = "loss") -> None:
    """Write an interactive page that holds all it needs: lines, or a plane as a surface that can be turned."""
    from plotly.graph_objects import Figure

    data, layout = traces(what, x, y)
    Figure(data, layout).write_html(path, include_plotlyjs=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
