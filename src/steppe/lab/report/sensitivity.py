"""Figures of error over hyper-parameters, in a comparison and in the search before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steppe.lab import spec
from steppe.lab.report.figures import Figure, axes, curve, deviation, look
from steppe.lab.spec import Method
from steppe.lab.statistics import mean
from steppe.lab.summary import Summary

_SYMBOLS = {"dropped": "x", "collapsed": "x", "chosen": "star"}


@dataclass(frozen=True)
class Point:
    """Errors at some values of hyper-parameters; ``note`` is a key of ``_SYMBOLS``, or empty."""

    at: Mapping[str, Any]
    errors: list[float]
    note: str = ""


def sensitivities(found: Summary) -> list[Figure]:
    """Draw the error of the methods of one name over one numeric option; a curve for each choice of the others.

    An option that a method leaves out has its default; ``m`` left out is the whole batch.
    """
    points: dict[str, list[Point]] = {}
    for row in found.rows:
        errors, note = list(found.errors(row.method).values()), "collapsed" if row.collapsed else ""
        at = _values(row.method, found.plan.settings.batch_size)
        points.setdefault(row.method.name, []).append(Point(at, errors, note))
    caption = f"Mean {found.metric}, one standard deviation over seeds. A cross: runs collapsed."
    titles = {name: (f"over-{name}", f"Hyper-parameters of {name}", caption, found.metric) for name in points}
    drawn = (_figure(*titles[name], each) for name, each in points.items())
    return [figure for figure in drawn if figure is not None]


def _values(method: Method, batch: int) -> dict[str, Any]:
    """Return all options of a method, those left out at their defaults."""
    values = spec.defaults_of(method.name) | dict(method.options) | {"epochs": method.epochs or "1x"}
    return values | ({"m": min(values["m"] or batch, batch)} if "m" in values else {})


def searches(found: Summary) -> list[Figure]:
    """Draw every stage of the search: the validation error of each point, and which was chosen."""
    drawn = []
    for stage in found.context.search.get("stages", []):
        points = []
        for each in stage["points"]:
            note = "dropped" if each["dropped"] else "chosen" if each["values"] == stage["chosen"] else ""
            points += [Point(each["values"], each["errors"], note)] if each["errors"] else []
        told = ", ".join(f"{key} {value}{_edge(value, key, points)}" for key, value in stage["chosen"].items())
        caption = (
            f"{stage['method']}: validation {found.metric}, mean over {found.context.search['seeds']} seeds; "
            f"chosen (star): {told}. A cross: dropped before its last seed."
        )
        titles = f"search-{stage['name']}", f"Search: {stage['name']}", caption, found.metric
        drawn.append(_figure(*titles, points))
    return [figure for figure in drawn if figure is not None]


def _edge(value: float, key: str, points: list[Point]) -> str:
    """Mark a chosen value that is the first or last of more than two: the best may lie beyond."""
    grid = _grid(points, key)
    return " (at the edge of the grid)" if len(grid) > 2 and value in (grid[0], grid[-1]) else ""


def _grid(points: list[Point], key: str) -> list[Any]:
    return sorted({point.at[key] for point in points})


def _curves(points: list[Point], key: str) -> dict[str, list[Point]]:
    """Return the points as curves over one key, each named by what else distinguishes it."""
    others = [k for k in points[0].at if k != key and len({repr(point.at[k]) for point in points}) > 1]
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.at[key]):
        curves.setdefault(", ".join(f"{k} {point.at[k]}" for k in others), []).append(point)
    return curves


def _figure(id: str, title: str, caption: str, metric: str, points: list[Point]) -> Figure | None:
    """Draw points over the numeric key that gives the longest curve; return None if no curve has two points."""
    keys = [key for key in (points[0].at if points else ()) if all(isinstance(p.at[key], int | float) for p in points)]
    by_key = {key: _curves(points, key) for key in keys}
    key = max(by_key, key=lambda key: max(map(len, by_key[key].values())), default="")
    curves = by_key.get(key, {})
    if max(map(len, curves.values()), default=0) < 2:
        return None
    data = []
    for i, (label, line) in enumerate(curves.items(), start=2):  # other figures have the first colours for SGD
        colour, _, symbol = look(i)
        symbols = [_SYMBOLS.get(point.note, symbol) for point in line]
        deviations = [deviation(point.errors) for point in line]
        more = {"mode": "lines+markers", "showlegend": len(curves) > 1, "text": [point.note for point in line]}
        more |= {"marker": {"color": colour, "size": 10, "symbol": symbols}}
        more |= {"error_y": {"array": deviations, "color": colour, "thickness": 1.5}}
        x, y = [str(point.at[key]) for point in line], [mean(point.errors) for point in line]
        data.append(curve(x, y, label, i, **more))
    order = {"type": "category", "categoryorder": "array", "categoryarray": list(map(str, _grid(points, key)))}
    return Figure(id, title, caption, data, axes(key, metric, xaxis=order, yaxis={"rangemode": "tozero"}))
