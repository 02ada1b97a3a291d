"""The figure of a study of weak errors. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steppe.sde.study import ErrorCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {
    "SGD": ("#000000", "x"),
    "n-USAM": ("#56b4e9", "^"),
    "USAM": ("#0072b2", "s"),
    "m-USAM": ("#009e73", "o"),
    "n-SAM": ("#e69f00", "^"),
    "SAM": ("#d55e00", "s"),
    "m-SAM": ("#cc79a7", "o"),
}
TITLES = {
    "lr": "equation without correction: order 1 in lr",
    "lr, corrected": "with the lr/2 correction: order 2 in lr",
    "rho": "beyond the error at rho 0: order 2 in rho",
}


def orders(curves: Sequence[ErrorCurve]) -> Figure:
    """Return the figure of weak errors against lr and rho, logarithmic.

    A dashed line has the claimed order. Hollow marks do not differ significantly from 0.
    """
    from matplotlib.figure import Figure

    functions = list(dict.fromkeys(curve.function for curve in curves))
    figure = Figure(figsize=(13, 3.6 * len(functions)), layout="constrained", dpi=110)
    axes = figure.subplots(len(functions), 3, squeeze=False)
    for row, function in zip(axes, functions, strict=True):
        for axis, (against, title) in zip(row, TITLES.items(), strict=True):
            shown = [curve for curve in curves if (curve.function, curve.against) == (function, against) and curve.at]
            _panel(axis, shown, 1 if against == "lr" else 2)
            axis.set(title=title, xlabel=against.split(",")[0], ylabel=f"weak error of {function}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _panel(axis: Axes, curves: Sequence[ErrorCurve], order: int) -> None:
    axis.set(xscale="log", yscale="log")
    for curve in curves:
        color, mark = STYLES[curve.rule]
        sizes, bars = [abs(e.mean) for e in curve.errors], [1.96 * e.error for e in curve.errors]
        axis.errorbar(curve.at, sizes, bars, color=color, linewidth=1, capsize=2, alpha=0.6)
        axis.plot([], [], f"-{mark}", color=color, label=curve.rule)
        for h, size, e in zip(curve.at, sizes, curve.errors, strict=True):
            axis.plot(h, size, mark, color=color, markersize=6, markerfacecolor=color if e.resolved else "white")
    resolved = [(h, abs(e.mean)) for curve in curves for h, e in zip(curve.at, curve.errors, strict=True) if e.resolved]
    if not resolved:
        return
    grid = sorted({h for curve in curves for h in curve.at})
    top = max(h for h, _ in resolved)
    anchor = max(size for h, size in resolved if h == top)
    claimed = [1.6 * anchor * (h / top) ** order for h in grid]
    axis.plot(grid, claimed, "--", color="grey", linewidth=1, label="claimed order")
    axis.set_ylim(min(size for _, size in resolved) / 5, 5 * anchor)
    axis.set_xticks(grid, [f"{h:g}" for h in grid])
    axis.minorticks_off()
