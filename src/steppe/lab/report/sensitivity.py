"""Figures of error over hyper-parameters, in a comparison and in the search before it."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steppe.lab import spec
from steppe.lab.report.figures import COLLAPSED, CurveStyle, Figure, axes
from steppe.lab.spec import Method
from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Summary

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """The mean error in per cent at some values of hyper-parameters."""

    at: Values
    mean: float
    sd: float = 0.0
    note: str = ""


def sensitivities(found: Summary) -> list[Figure]:
    """Draw error over each numeric option that methods of one name differ in; one curve for each choice of the rest.

    An option that a method leaves out has its default; ``m`` left out is the whole batch.
    """
    drawn = []
    for name in dict.fromkeys(row.method.name for row in found.rows):
        rows = [row for row in found.rows if row.method.name == name]
        points = [
            Point(
                _values(row.method, found.plan.settings.batch_size),
                row.mean,
                row.sd if row.n > 1 else 0.0,
                "collapsed" if row.collapsed else "",
            )
            for row in rows
        ]
        shown: set[int] = set()
        for key in _numeric(points):
            curves = {label: curve for label, curve in _curves(points, key).items() if len(curve) > 1}
            new = {id(point) for curve in curves.values() for point in curve}
            if not new <= shown:  # else an earlier figure has all of them
                caption = (
                    f"Mean error of {name} in per cent, one standard deviation over seeds. A cross: runs collapsed."
                )
                drawn.append(_figure(f"over-{name}-{key}", f"{name} over {key}", caption, key, curves))
            shown |= new
    return drawn


def _values(method: Method, batch: int) -> Values:
    """Return all options of a method, those left out at their defaults."""
    parameters = inspect.signature(spec.choices()[method.name]).parameters
    options = [key for key in spec.options_of(method.name) if key in parameters]
    values = {key: parameters[key].default for key in options} | dict(method.options)
    if "m" in values:
        values["m"] = min(values["m"] or batch, batch)
    return values | {"epochs": method.epochs or "1x"}


def _numeric(points: list[Point]) -> list[str]:
    """Return the numeric keys in which points differ, that with most values first."""
    numbers = {
        key: len(_distinct(points, key))
        for key in points[0].at
        if all(isinstance(point.at[key], int | float) for point in points)
    }
    return sorted((key for key, count in numbers.items() if count > 1), key=lambda key: -numbers[key])


def _distinct(points: Iterable[Point], key: str) -> list[Any]:
    return sorted({point.at[key] for point in points})


def _curves(points: list[Point], key: str) -> dict[str, list[Point]]:
    """Return the points as curves over one key, each named by what else distinguishes it."""
    others = [k for k in points[0].at if k != key and len({repr(point.at[k]) for point in points}) > 1]
    curves: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.at[key]):
        curves.setdefault(", ".join(f"{k} {point.at[k]}" for k in others), []).append(point)
    return curves


def searches(found: Summary) -> list[Figure]:
    """Draw every stage of the search: the validation error of each point, and which was chosen."""
    drawn = []
    for stage in found.context.search.get("stages", []):
        chosen = stage["chosen"]
        points = [
            Point(
                point["values"],
                mean(point["errors"]),
                spread(point["errors"]) if len(point["errors"]) > 1 else 0.0,
                "dropped" if point["dropped"] else "chosen" if point["values"] == chosen else "",
            )
            for point in stage["points"]
            if point["errors"]
        ]
        if len(points) < 2:
            continue
        key = (_numeric(points) or list(chosen))[0]
        told = ", ".join(f"{key} {value}{_edge(key, value, points)}" for key, value in chosen.items())
        caption = (
            f"{stage['method']}: validation error in per cent, mean over {found.context.search['seeds']} seeds; "
            f"chosen (star): {told}. A cross: dropped before its last seed."
        )
        title = f"Search: {stage['name']}"
        drawn.append(_figure(f"search-{stage['name']}", title, caption, key, _curves(points, key)))
    return drawn


def _edge(key: str, value: float, points: list[Point]) -> str:
    """Mark a chosen value that is the first or last of more than two: the best may lie beyond."""
    values = _distinct(points, key)
    return " (at the edge of the grid)" if len(values) > 2 and value in (values[0], values[-1]) else ""


def _figure(id: str, title: str, caption: str, key: str, curves: dict[str, list[Point]]) -> Figure:
    ticks = [str(value) for value in _distinct((point for curve in curves.values() for point in curve), key)]
    data = []
    for i, (label, curve) in enumerate(curves.items(), start=2):
        style = CurveStyle.of(i)
        symbols = {"dropped": COLLAPSED, "collapsed": COLLAPSED, "chosen": "star", "": style.symbol}
        data.append(
            {
                "x": [str(point.at[key]) for point in curve],
                "y": [point.mean for point in curve],
                "text": [point.note for point in curve],
                "error_y": {"array": [point.sd for point in curve], "color": style.colour, "thickness": 1.5},
                "name": label,
                "showlegend": len(curves) > 1,
                "mode": "lines+markers",
                "line": style.line,
                "marker": {"color": style.colour, "size": 10, "symbol": [symbols[point.note] for point in curve]},
                "hovertemplate": f"{key} %{{x}}: %{{y:.2f}} % %{{text}}",
            }
        )
    order = {"type": "category", "categoryorder": "array", "categoryarray": ticks}
    return Figure(id, title, caption, data, axes(key, "error, %", xaxis=order, yaxis={"rangemode": "tozero"}))
