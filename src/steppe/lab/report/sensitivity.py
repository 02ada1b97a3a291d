"""Figures over hyper-parameters, of a comparison and of the search before it, and of every two methods."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from steppe.lab.report.figures import COLOURS, Figure, Trace
from steppe.lab.spec import Method
from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Summary, pairs
from steppe.lab.tables import MINUS

_MOST = 16  # methods that a matrix of pairs has room for


@dataclass(frozen=True)
class Cell:
    """The mean error in per cent at some values of hyper-parameters."""

    at: Mapping[str, Any]
    mean: float
    sd: float = 0.0
    note: str = ""


def sensitivities(found: Summary) -> list[Figure]:
    """Draw error over one numeric option, or over two, where methods differ in these alone."""
    drawn = []
    for name, options in _families(found).items():
        cells = [
            Cell({key: dict(row.method.options)[key] for key in options}, row.mean, row.sd if row.n > 1 else 0.0)
            for row in found.rows
            if row.method.name == name and set(options) <= dict(row.method.options).keys()
        ]
        caption = f"Mean test error of {name} in per cent, over seeds."
        drawn.append(_figure(f"over-{name}", f"{name} over {' and '.join(options)}", caption, options, cells))
    return drawn


def _families(found: Summary) -> dict[str, list[str]]:
    """Return by method name the options, less m, in which its rows differ, where these are one or two numbers."""
    families: dict[str, list[Method]] = {}
    for row in found.rows:
        if row.method.options:
            families.setdefault(row.method.name, []).append(row.method)
    varied = {name: _varied([dict(method.options) for method in methods]) for name, methods in families.items()}
    return {name: keys for name, keys in varied.items() if 1 <= len(keys) <= 2 and "m" not in keys}


def _varied(options: list[dict[str, object]]) -> list[str]:
    keys = [key for key in options[0] if all(key in each for each in options)]
    values = {key: {each[key] for each in options} for key in keys}
    return [key for key in keys if len(values[key]) > 1 and all(isinstance(v, int | float) for v in values[key])]


def searches(found: Summary) -> list[Figure]:
    """Draw every stage of the search: the validation error of each point, and which was chosen."""
    drawn = []
    for stage in found.context.search.get("stages", []):
        cells = [
            Cell(
                point["values"],
                mean(point["errors"]),
                spread(point["errors"]) if len(point["errors"]) > 1 else 0.0,
                "dropped" if point["dropped"] else "",
            )
            for point in stage["points"]
        ]
        keys = list(stage["chosen"])
        chosen = ", ".join(f"{key} {value}{_edge(key, value, cells)}" for key, value in stage["chosen"].items())
        caption = (
            f"{stage['method']}: validation error in per cent, mean over {found.context.search['seeds']} seeds; "
            f"chosen: {chosen}. A cross: dropped before its last seed."
        )
        if len(cells) > 1 and len(keys) <= 2:
            drawn.append(_figure(f"search-{stage['name']}", f"Search: {stage['name']}", caption, keys, cells))
    return drawn


def _edge(key: str, value: float, cells: list[Cell]) -> str:
    """Say so where a chosen value is the first or last of more than two: the best may lie beyond."""
    values = _values(cells, key)
    return " (at the edge of the grid)" if len(values) > 2 and value in (values[0], values[-1]) else ""


def _figure(id: str, title: str, caption: str, keys: list[str], cells: list[Cell]) -> Figure:
    draw = _line if len(keys) == 1 else _heat
    data, layout = draw(keys, cells)
    return Figure(id, title, caption, data, layout, height=400)


def _line(keys: list[str], cells: list[Cell]) -> tuple[list[Trace], dict[str, Any]]:
    (key,), cells = keys, sorted(cells, key=lambda cell: cell.at[keys[0]])
    trace: Trace = {
        "x": [str(cell.at[key]) for cell in cells],
        "y": [cell.mean for cell in cells],
        "text": [cell.note for cell in cells],
        "error_y": {"array": [cell.sd for cell in cells], "color": COLOURS[2], "thickness": 1.5},
        "mode": "lines+markers",
        "line": {"color": COLOURS[2], "width": 2},
        "marker": {"color": COLOURS[2], "size": 9, "symbol": ["x" if cell.note else "circle" for cell in cells]},
        "hovertemplate": f"{key} %{{x}}: %{{y:.2f}} % %{{text}}<extra></extra>",
    }
    axes = {
        "xaxis": {"title": {"text": key}, "type": "category"},
        "yaxis": {"title": {"text": "error, %"}, "rangemode": "tozero"},
    }
    return [trace], axes


def _heat(keys: list[str], cells: list[Cell]) -> tuple[list[Trace], dict[str, Any]]:
    down, across = keys
    rows, columns = _values(cells, down), _values(cells, across)
    at = {(cell.at[down], cell.at[across]): cell for cell in cells}
    grid = [[at.get((row, column)) for column in columns] for row in rows]
    trace: Trace = {
        "type": "heatmap",
        "x": list(map(str, columns)),
        "y": list(map(str, rows)),
        "z": [[None if cell is None else cell.mean for cell in line] for line in grid],
        "text": [["" if cell is None else f"{cell.mean:.1f}" for cell in line] for line in grid],
        "texttemplate": "%{text}",
        "colorscale": "Viridis",
        "reversescale": True,
        "colorbar": {"title": {"text": "error, %"}},
        "hovertemplate": f"{down} %{{y}}, {across} %{{x}}: %{{z:.2f}} %<extra></extra>",
    }
    axes = {
        "xaxis": {"title": {"text": across}, "type": "category"},
        "yaxis": {"title": {"text": down}, "type": "category", "automargin": True},
    }
    return [trace], axes


def _values(cells: Iterable[Cell], key: str) -> list[Any]:
    return sorted({cell.at[key] for cell in cells})


def pair_matrix(found: Summary) -> list[Figure]:
    """Draw the difference of every two methods, and which differences are clear."""
    if not 3 <= len(found.rows) <= _MOST or max(row.n for row in found.rows) < 2:
        return []
    couples = pairs(found)
    both = {(pair.method, pair.other): (pair.paired.difference, pair) for pair in couples}
    both |= {(pair.other, pair.method): (-pair.paired.difference, pair) for pair in couples}
    methods = [row.method for row in found.rows]
    grid = [[both.get((row, column)) for column in methods] for row in methods]
    widest = max(abs(difference) for difference, _ in both.values()) or 1.0
    texts = [["" if cell is None else _signed(cell[0], cell[1].p) for cell in line] for line in grid]
    notes = [["" if cell is None else f"p {cell[1].p:.2g}, n {cell[1].paired.n}" for cell in line] for line in grid]
    trace: Trace = {
        "type": "heatmap",
        "x": list(map(str, methods)),
        "y": list(map(str, methods)),
        "z": [[None if cell is None else cell[0] for cell in line] for line in grid],
        "text": texts,
        "customdata": notes,
        "texttemplate": "%{text}",
        "colorscale": [[0, "#3b8eea"], [0.5, "#808893"], [1, "#e2504a"]],
        "zmin": -widest,
        "zmax": widest,
        "showscale": False,
        "textfont": {"color": "#ffffff"},
        "hovertemplate": "%{y} minus %{x}: %{z:+.2f}, %{customdata}<extra></extra>",
    }
    layout = {"yaxis": {"autorange": "reversed", "automargin": True}, "xaxis": {"automargin": True, "tickangle": -30}}
    caption = (
        "Row minus column in percentage points, paired by seed: blue, the row has the lower error. A star: p < 0.05, "
        f"paired t-test, Holm-corrected over all {len(couples)} pairs."
    )
    figure = Figure("pairs", "Every two methods", caption, [trace], layout)
    return [replace(figure, height=200 + 36 * len(methods))]


def _signed(difference: float, p: float) -> str:
    return f"{difference:+.1f}{'*' if p < 0.05 else ''}".replace("-", MINUS)
