"""The picture of a study; a pure function of its record."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steppe.sde.study import Line

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


def orders(lines: Sequence[Line], file: Path) -> None:
    """Weak error against lr and rho, logarithmic, with the claimed order as a dashed line; hollow: not told from 0."""
    functions = list(dict.fromkeys(line.function for line in lines))
    figure = Figure(figsize=(13, 3.6 * len(functions)), layout="constrained", dpi=110)
    axes = figure.subplots(len(functions), 3, squeeze=False)
    for row, function in zip(axes, functions, strict=True):
        for axis, (against, title) in zip(row, TITLES.items(), strict=True):
            shown = [line for line in lines if (line.function, line.against) == (function, against) and line.at]
            _panel(axis, shown, 1 if against == "lr" else 2)
            axis.set(title=title, xlabel=against.split(",")[0], ylabel=f"weak error of {function}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(file)


def _panel(axis: Axes, lines: Sequence[Line], order: int) -> None:
    axis.set(xscale="log", yscale="log")
    for line in lines:
        color, mark = STYLES[line.rule]
        sizes, bars = [abs(e.mean) for e in line.errors], [1.96 * e.error for e in line.errors]
        axis.errorbar(line.at, sizes, bars, color=color, linewidth=1, capsize=2, alpha=0.6)
        axis.plot([], [], f"-{mark}", color=color, label=line.rule)
        for h, size, e in zip(line.at, sizes, line.errors, strict=True):
            axis.plot(h, size, mark, color=color, markersize=6, markerfacecolor=color if e.resolved else "white")
    resolved = [(h, abs(e.mean)) for line in lines for h, e in zip(line.at, line.errors, strict=True) if e.resolved]
    if not resolved:
        return
    grid = np.array(sorted({h for line in lines for h in line.at}))
    top = max(h_ for h_, _ in resolved)
    anchor = max(size for h_, size in resolved if h_ == top)
    axis.plot(grid, 1.6 * anchor * (grid / top) ** order, "--", color="grey", linewidth=1, label="claimed order")
    axis.set_ylim(min(size for _, size in resolved) / 5, 5 * anchor)
    axis.set_xticks(grid, [f"{v:g}" for v in grid])
    axis.minorticks_off()
