"""The report's figures as plain data for plotly.js: a trace is a dict, a figure a title, a caption, traces and axes.

Colours of text, grid and background belong to the page, which knows whether it is light or dark.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from steppe.lab.record import Record
from steppe.lab.spec import Method
from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Summary

Trace = dict[str, Any]
COLOURS = (
    "#808893", "#b08a5b", "#3b8eea", "#7f6be0", "#d65db1", "#e0a100",
    "#ee7f31", "#e2504a", "#c4557f", "#2fa57a", "#19a7c0", "#8aa62a",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure; `layout` holds only axes and their titles."""

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 420


def figures(found: Summary) -> list[Figure]:
    """Return every figure that the records can fill."""
    if not found.rows:
        return []
    drawn = [errors(found), curves(found, "test_error"), curves(found, "train_loss"), sweep(found), cost(found)]
    return [figure for figure in drawn if figure is not None]


def colour(found: Summary, method: Method) -> str:
    """Return the method's colour, the same in every figure."""
    return COLOURS[found.plan.methods.index(method) % len(COLOURS)]


def errors(found: Summary) -> Figure:
    """Draw each method's mean error with its spread, and every seed's point."""
    data: list[Trace] = []
    for row in found.rows:
        records, name, tint = found.of(row.method), str(row.method), colour(found, row.method)
        seeds: Trace = {
            "x": [100 * record.test_error for record in records],
            "y": [name] * len(records),
            "text": [f"seed {record.seed}{', collapsed' if record.collapsed else ''}" for record in records],
            "marker": {"color": tint, "opacity": 0.55, "size": 8, "symbol": [_symbol(r) for r in records]},
        }
        centre: Trace = {
            "x": [row.mean],
            "y": [name],
            "text": [f"mean of {row.n}"],
            "marker": {"color": tint, "size": 15, "symbol": "line-ns", "line": {"color": tint, "width": 3}},
            "error_x": {"array": [row.sd if row.n > 1 else 0], "color": tint, "thickness": 1.5, "width": 0},
        }
        style = {"mode": "markers", "showlegend": False, "hovertemplate": "%{y}<br>%{text}: %{x:.2f} %<extra></extra>"}
        data += [trace | style for trace in (seeds, centre)]
    layout = {
        "xaxis": {"title": {"text": "test error at the last epoch, %"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
    }
    caption = (
        "Each point is a seed (a cross: collapsed), the tick the mean, the line one standard deviation either side."
    )
    return Figure("errors", "Error by method", caption, data, layout, height=110 + 34 * len(found.rows))


def _symbol(record: Record) -> str:
    return "x" if record.collapsed else "circle"


@dataclass(frozen=True)
class _Curve:
    title: str
    axis: str
    value: Callable[[float], float] = field(default=lambda value: value)


_CURVES = {
    "test_error": _Curve("Test error by epoch", "test error, %", lambda share: 100 * share),
    "train_loss": _Curve("Training loss by epoch", "training loss"),
}


def curves(found: Summary, quantity: str) -> Figure:
    """Draw a quantity's mean over seeds by epoch, with a band of one standard deviation."""
    kind, data = _CURVES[quantity], []
    for row in found.rows:
        points = _points(found.of(row.method), quantity, kind.value)
        data += _band(str(row.method), colour(found, row.method), points)
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": {"title": {"text": kind.axis}}}
    caption = "Mean over seeds and a band of one standard deviation; a click in the legend hides a method."
    return Figure(quantity.replace("_", "-"), kind.title, caption, data, layout, height=480)


def _points(records: list[Record], quantity: str, scale: Callable[[float], float]) -> dict[float, list[float]]:
    """Return the finite values of all seeds by epoch."""
    points: dict[float, list[float]] = {}
    for record in records:
        for epoch, value in zip(record.curves["epoch"], record.curves[quantity], strict=True):
            if epoch is not None and value is not None:
                points.setdefault(epoch, []).append(scale(value))
    return dict(sorted(points.items()))


def _band(name: str, tint: str, points: dict[float, list[float]]) -> list[Trace]:
    epochs, centre = list(points), [mean(values) for values in points.values()]
    widths = [spread(values) if len(values) > 1 else 0.0 for values in points.values()]
    high = [middle + width for middle, width in zip(centre, widths, strict=True)]
    low = [middle - width for middle, width in zip(centre, widths, strict=True)]
    line = {"x": epochs, "y": centre, "name": name, "line": {"color": tint, "width": 2}, "hovertemplate": "%{y:.3g}"}
    band = {"x": epochs + epochs[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": f"{tint}2a"}
    silent = {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [trace | {"mode": "lines", "legendgroup": name} for trace in (band | silent, line)]


def sweep(found: Summary) -> Figure | None:
    """Draw error against the micro-batch size m, for methods that differ in m alone; without m it is the batch."""
    groups: dict[Method, dict[int, tuple[float, float]]] = {}
    for row in found.rows:
        rest = replace(row.method, options=tuple(pair for pair in row.method.options if pair[0] != "m"))
        whole = found.plan.settings.batch_size
        m = dict(row.method.options).get("m") or whole
        if isinstance(m, int) and row.method.name != "SGD":
            m = min(m, whole)
            groups.setdefault(rest, {})[m] = (row.mean, row.sd if row.n > 1 else 0.0)
    swept = {rest: dict(sorted(points.items())) for rest, points in groups.items() if len(points) > 1}
    if not swept:
        return None
    data = [
        _swept(str(rest), COLOURS[(2 + 4 * i) % len(COLOURS)], points) for i, (rest, points) in enumerate(swept.items())
    ]
    sizes = sorted({m for points in swept.values() for m in points})
    ticks = {"type": "log", "tickvals": sizes, "ticktext": list(map(str, sizes))}
    layout = {
        "xaxis": {"title": {"text": "examples that share one perturbation, m"}, **ticks},
        "yaxis": {"title": {"text": "test error, %"}, "rangemode": "tozero"},
    }
    caption = (
        f"Mean and one standard deviation at the same rho; m = {found.plan.settings.batch_size} is the whole batch."
    )
    return Figure("m-sweep", "Error against m", caption, data, layout)


def _swept(name: str, tint: str, points: dict[int, tuple[float, float]]) -> Trace:
    return {
        "x": list(points),
        "y": [centre for centre, _ in points.values()],
        "error_y": {"array": [sd for _, sd in points.values()], "color": tint, "thickness": 1.5},
        "name": name,
        "showlegend": True,
        "mode": "lines+markers",
        "line": {"color": tint, "width": 2},
        "marker": {"color": tint, "size": 9},
        "hovertemplate": "m = %{x}: %{y:.2f} %<extra></extra>",
    }


def cost(found: Summary) -> Figure:
    """Draw error against what a run costs, in gradient passes and in seconds."""
    data: list[Trace] = []
    for row in found.rows:
        name, tint = str(row.method), colour(found, row.method)
        common: Trace = {
            "y": [row.mean],
            "error_y": {"array": [row.sd if row.n > 1 else 0], "color": tint, "thickness": 1.5},
            "name": name,
            "legendgroup": name,
            "mode": "markers",
            "marker": {"color": tint, "size": 11, "symbol": "x" if row.collapsed else "circle"},
        }
        passes = {"x": [row.passes], "hovertemplate": f"{name}<br>%{{x:.0f}} passes: %{{y:.2f}} %<extra></extra>"}
        seconds = {"x": [row.seconds], "hovertemplate": f"{name}<br>%{{x:.1f}} s: %{{y:.2f}} %<extra></extra>"}
        data += [common | passes, common | seconds | {"xaxis": "x2", "yaxis": "y2", "showlegend": False}]
    data += [_front([(row.passes, row.mean) for row in found.rows], {})]
    data += [_front([(row.seconds, row.mean) for row in found.rows], {"xaxis": "x2", "yaxis": "y2"})]
    layout = {
        "xaxis": {
            "title": {"text": "gradient passes over the training set"},
            "rangemode": "tozero",
            "domain": [0, 0.47],
        },
        "xaxis2": {"title": {"text": "seconds a run"}, "rangemode": "tozero", "domain": [0.53, 1], "anchor": "y2"},
        "yaxis": {"title": {"text": "test error, %"}, "rangemode": "tozero"},
        "yaxis2": {"rangemode": "tozero", "matches": "y", "showticklabels": False, "anchor": "x2"},
    }
    caption = (
        "Mean over seeds, one standard deviation to either side. Down and to the left is better; "
        "the stepped line joins the methods that no other beats in both."
    )
    return Figure("cost", "Cost against error", caption, data, layout, height=480)


def _front(points: list[tuple[float, float]], axes: Trace) -> Trace:
    """Return the Pareto front of (cost, error) as a stepped line."""
    front: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    line = {"color": COLOURS[0], "width": 1, "dash": "dot", "shape": "hv"}
    trace: Trace = {"x": [cost for cost, _ in front], "y": [error for _, error in front], "mode": "lines", "line": line}
    return trace | axes | {"showlegend": False, "hoverinfo": "skip"}
