"""The report's figures as plain data for plotly.js: a trace is a dict, a figure a title, a caption, traces and axes.

The page sets the colours of text, grid and background, because it knows whether it is light or dark.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steppe.lab.record import Record
from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Row, Summary

Trace = dict[str, Any]
COLOURS = (  # contrast of at least 3 with the page, light and dark
    "#808893", "#b08a5b", "#3b8eea", "#7f6be0", "#d65db1", "#a98200",
    "#d9691e", "#e2504a", "#c4557f", "#2a9670", "#1593aa", "#76902a",
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagram")
COLLAPSED = "x"  # the symbol of a run that collapsed, and of a point that a search dropped


@dataclass(frozen=True)
class Figure:
    """One figure; ``layout`` holds only axes and their titles."""

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 420


@dataclass(frozen=True)
class CurveStyle:
    """How one curve is drawn: colour, dash pattern and symbol differ from curve to curve."""

    colour: str
    dash: str
    symbol: str

    @classmethod
    def of(cls, index: int) -> "CurveStyle":
        """Return the style of the ``index``-th curve."""
        return cls(*(choices[index % len(choices)] for choices in (COLOURS, _DASHES, _SYMBOLS)))

    @property
    def line(self) -> dict[str, Any]:
        """Return the line style."""
        return {"color": self.colour, "dash": self.dash, "width": 2}


def styled_rows(found: Summary) -> list[tuple[Row, CurveStyle]]:
    """Return every row with its style, which is the same in every figure."""
    return [(row, CurveStyle.of(found.plan.methods.index(row.method))) for row in found.rows]


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Return a layout whose axes have these titles; ``more`` holds further properties by axis."""
    return {key: {"title": {"text": text}} | more.get(key, {}) for key, text in {"xaxis": x, "yaxis": y}.items()}


def results(found: Summary) -> list[Figure]:
    """Return the figures of errors, curves and cost, none where no run is finished."""
    if not found.rows:
        return []
    curves = (
        _curves(found, "test_error", "Test error by epoch", "test error, %", lambda share: 100 * share),
        _curves(found, "train_loss", "Training loss by epoch", "training loss"),
    )
    costs = (
        _cost(found, "passes", "gradient passes", lambda row: row.passes),
        _cost(found, "seconds", "seconds a run", lambda row: row.seconds),
    )
    return [_errors(found), *curves, *costs]


def _errors(found: Summary) -> Figure:
    """Draw each method's mean error with its spread, and every seed's point."""
    data: list[Trace] = []
    for row, style in styled_rows(found):
        records, name = found.of(row.method), str(row.method)
        seeds: Trace = {
            "x": [100 * record.test_error for record in records],
            "y": [name] * len(records),
            "text": [f"seed {record.seed}{', collapsed' if record.collapsed else ''}" for record in records],
            "marker": {
                "color": style.colour,
                "opacity": 0.55,
                "size": 8,
                "symbol": [COLLAPSED if record.collapsed else "circle" for record in records],
            },
        }
        centre: Trace = {
            "x": [row.mean],
            "y": [name],
            "text": [f"mean of {row.n}"],
            "marker": {
                "color": style.colour,
                "size": 15,
                "symbol": "line-ns",
                "line": {"color": style.colour, "width": 3},
            },
            "error_x": {"array": [_sd(row)], "color": style.colour, "thickness": 1.5, "width": 0},
        }
        shared = {"mode": "markers", "showlegend": False, "hovertemplate": "%{y}<br>%{text}: %{x:.2f} %<extra></extra>"}
        data += [trace | shared for trace in (seeds, centre)]
    layout = axes(
        "error, %",
        "",
        xaxis={"rangemode": "tozero"},
        yaxis={"autorange": "reversed", "automargin": True},
    )
    caption = "Each point is a seed (a cross: collapsed), the tick the mean, the line one standard deviation each side."
    return Figure("errors", "Error by method", caption, data, layout, height=110 + 34 * len(found.rows))


def _sd(row: Row) -> float:
    return row.sd if row.n > 1 else 0.0


def _curves(
    found: Summary, quantity: str, title: str, axis: str, scale: Callable[[float], float] = lambda value: value
) -> Figure:
    """Draw a quantity's mean over seeds by epoch, with a band of one standard deviation."""
    data = []
    for row, style in styled_rows(found):
        data += _band(str(row.method), style, _by_epoch(found.of(row.method), quantity, scale))
    caption = "Mean over seeds and a band of one standard deviation; a click in the legend hides a method."
    return Figure(quantity.replace("_", "-"), title, caption, data, axes("epoch", axis), height=480)


def _by_epoch(records: list[Record], quantity: str, scale: Callable[[float], float]) -> dict[float, list[float]]:
    """Return the finite values of all seeds by epoch."""
    points: dict[float, list[float]] = {}
    for record in records:
        for epoch, value in zip(record.curves["epoch"], record.curves[quantity], strict=True):
            if epoch is not None and value is not None:
                points.setdefault(epoch, []).append(scale(value))
    return dict(sorted(points.items()))


def _band(name: str, style: CurveStyle, points: dict[float, list[float]]) -> list[Trace]:
    epochs, centre = list(points), [mean(values) for values in points.values()]
    widths = [spread(values) if len(values) > 1 else 0.0 for values in points.values()]
    high = [middle + width for middle, width in zip(centre, widths, strict=True)]
    low = [middle - width for middle, width in zip(centre, widths, strict=True)]
    line = {"x": epochs, "y": centre, "name": name, "line": style.line, "hovertemplate": "%{y:.3g}"}
    band = {"x": epochs + epochs[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": f"{style.colour}2a"}
    silent = {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [trace | {"mode": "lines", "legendgroup": name} for trace in (band | silent, line)]


def _cost(found: Summary, id: str, axis: str, value: Callable[[Row], float]) -> Figure:
    """Draw error against what a run costs, and the methods that no other beats in both."""
    data: list[Trace] = [
        {
            "x": [value(row)],
            "y": [row.mean],
            "error_y": {"array": [_sd(row)], "color": style.colour, "thickness": 1.5},
            "name": str(row.method),
            "mode": "markers",
            "marker": {"color": style.colour, "size": 11, "symbol": COLLAPSED if row.collapsed else style.symbol},
            "hovertemplate": f"%{{x:.4g}} {id}: %{{y:.2f}} %",
        }
        for row, style in styled_rows(found)
    ]
    points = sorted((value(row), row.mean) for row in found.rows)
    front = [point for i, point in enumerate(points) if point[1] < min((y for _, y in points[:i]), default=math.inf)]
    line = {"color": COLOURS[0], "width": 1, "dash": "dot", "shape": "hv"}
    data.append({"x": [x for x, _ in front], "y": [y for _, y in front], "mode": "lines", "line": line})
    data[-1] |= {"showlegend": False, "hoverinfo": "skip"}
    caption = (
        "Mean and one standard deviation over seeds. Down and to the left is better; the stepped line joins the "
        "methods that no other beats in both."
    )
    zero = {"rangemode": "tozero"}
    layout = axes(axis, "error, %", xaxis=zero, yaxis=zero)
    return Figure(f"cost-{id}", f"Error against {id}", caption, data, layout)
