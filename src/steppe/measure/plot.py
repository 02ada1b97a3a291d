"""Pictures of lines and planes. Needs matplotlib: the extra ``measure``."""

import math
from pathlib import Path

import torch

from steppe.measure.landscape import Line, Plane


def png(what: dict[str, Line] | Plane, path: Path | str, x: str = "t", y: str = "loss") -> None:
    """Draw several lines, by name, or a plane's contours into a PNG file; ``x`` and ``y`` name the axes.

    Example:
        >>> png({"SGD": line(problem, d, t)}, "slice.png", x="along d")
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=150)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    if isinstance(what, Plane):
        loss = torch.tensor(what.loss, dtype=torch.float64).clamp(min=1e-12)
        low, high = (float(end) for end in loss[loss.isfinite()].aminmax())
        levels = torch.logspace(math.log10(low), math.log10(max(high, 1.001 * low)), 24, dtype=torch.float64).tolist()
        drawn = axes.contourf(what.x, what.y, loss, levels=levels, norm=LogNorm())
        axes.plot(0, 0, "+", color="white", markersize=10)
        figure.colorbar(drawn, ax=axes, label="loss", ticks=levels[::5], format="%.3g")
    else:
        for name, each in what.items():
            axes.plot(each.t, each.loss, label=name)
        axes.legend()
    figure.savefig(path, format="png")
