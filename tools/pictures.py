"""Draw the pictures of the docs: ``python tools/pictures.py``."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"


def loss(w: np.ndarray) -> np.ndarray:
    """A sharp minimum at -1.1 that is the lower one, and a flat one at 1.1."""
    return 1.25 - 1.1 * np.exp(-(((w + 1.1) / 0.22) ** 2)) - 0.95 * np.exp(-(((w - 1.1) / 0.95) ** 2)) + 0.02 * w**2


def worst(w: np.ndarray, rho: float) -> np.ndarray:
    """Return the highest loss within the radius of each w."""
    return np.stack([loss(w + e) for e in np.linspace(-rho, rho, 201)]).max(0)


def sharpness(path: Path, rho: float = 0.3) -> None:
    """Draw the loss, the worst loss within the radius, and the minimum of each."""
    w = np.linspace(-2.2, 2.6, 2001)
    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.subplots()
    for values, style, name in ((loss(w), "-", "loss $L(w)$"), (worst(w, rho), "--", r"worst loss within $\rho$")):
        axes.plot(w, values, style, label=name, lw=2)
        k = int(values.argmin())
        axes.plot(w[k], values[k], "o", ms=8, color=axes.lines[-1].get_color())
    for at, name in ((-1.1, "sharp"), (1.1, "flat")):
        axes.annotate(name, (at, 0.02), ha="center", color="0.35")
        axes.plot([at - rho, at + rho], [-0.04, -0.04], color="0.35", lw=3, solid_capstyle="butt")
    axes.set(xlabel="weights $w$", ylabel="loss", ylim=(-0.1, 1.5))
    axes.annotate(r"$2\rho$", (1.1, -0.04), xytext=(1.55, -0.02), va="center", color="0.35")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper center")
    with mpl.rc_context({"svg.hashsalt": "steppe"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sharpness(DOCS / "explanation" / "sharpness.svg")
