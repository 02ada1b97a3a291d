"""The report's figures as plain data: a trace is a dict, a figure a title, a caption, traces and axes.

``svg`` draws them. The page sets the colours of text and grid, because it knows whether it is light or dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steppe.lab.statistics import mean, spread
from steppe.lab.summary import Summary

Trace = dict[str, Any]
COLOURS = (  # contrast of at least 3 with the page, light and dark
    "#808893", "#b08a5b", "#3b8eea", "#7f6be0", "#d65db1", "#a98200",
    "#d9691e", "#e2504a", "#c4557f", "#2a9670", "#1593aa", "#76902a",
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "hexagram")


@dataclass(frozen=True)
class Figure:
    """One figure; ``layout`` holds only axes and their titles."""

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]


def look(index: int) -> tuple[str, str, str]:
    """Return colour, dash pattern and symbol of the ``index``-th curve; all three differ from curve to curve."""
    colour, dash, symbol = (choices[index % len(choices)] for choices in (COLOURS, _DASHES, _SYMBOLS))
    return colour, dash, symbol


def curve(x: Sequence[Any], y: Sequence[float | None], name: str, index: int, **more: Any) -> Trace:
    """Return the ``index``-th line of a figure; ``more`` holds further properties of the trace."""
    colour, dash, _ = look(index)
    line = {"color": colour, "dash": dash, "width": 2}
    return {"x": x, "y": y, "name": name, "mode": "lines", "line": line} | more


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    """Return a layout whose axes have these titles; ``more`` holds further properties by axis."""
    return {key: {"title": {"text": text}} | more.get(key, {}) for key, text in {"xaxis": x, "yaxis": y}.items()}


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample, 0 for one value."""
    return spread(values) if len(values) > 1 else 0.0


def learning(found: Summary) -> list[Figure]:
    """Draw test error and training loss by epoch, none where no run is finished."""
    if not found.rows:
        return []
    caption = "Mean over seeds and a band of one standard deviation."
    metric = found.metric
    error, loss = _bands(found, "test_error", 100.0 if metric.endswith("%") else 1.0), _bands(found, "train_loss", 1.0)
    return [
        Figure(
            "test-error",
            f"Test {metric.rstrip(' %')} by epoch",
            f"{caption} {found.direction.capitalize()}.",
            error,
            axes("epoch", f"test {metric}"),
        ),
        Figure("train-loss", "Training loss by epoch", caption, loss, axes("epoch", "training loss")),
    ]


def _bands(found: Summary, quantity: str, scale: float) -> list[Trace]:
    """Return a quantity's mean over seeds by epoch, in a band of one standard deviation; skip what is not finite."""
    data = []
    for row in found.rows:
        index, name = found.plan.methods.index(row.method), str(row.method)
        points: dict[float, list[float]] = {}
        for record in found.of(row.method):
            for epoch, value in zip(record.curves["epoch"], record.curves[quantity], strict=True):
                if epoch is not None and value is not None:
                    points.setdefault(epoch, []).append(scale * value)
        epochs = sorted(points)
        centre, width = ([of(points[epoch]) for epoch in epochs] for of in (mean, deviation))
        high = [middle + half for middle, half in zip(centre, width, strict=True)]
        low = [middle - half for middle, half in zip(centre, width, strict=True)]
        silent = {"line": {"width": 0}, "showlegend": False}
        filled = {"fill": "toself", "fillcolor": look(index)[0]}
        data.append(curve(epochs + epochs[::-1], high + low[::-1], name, index, **silent, **filled))
        data.append(curve(epochs, centre, name, index))
    return data
