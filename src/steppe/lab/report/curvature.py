"""The report's table of measured minima (WSAM's Table 9, for every method), and figures of their surroundings."""

import math
from dataclasses import dataclass
from pathlib import Path

from steppe.lab import minima, tables
from steppe.lab.errors import LabError
from steppe.lab.minima import Measured
from steppe.lab.report.figures import Figure, axes, curve
from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, corrected, mean, over_seeds, spread
from steppe.lab.summary import Summary
from steppe.lab.tables import MINUS, NONE, number

COLUMNS = {"loss": "loss", "top eigenvalue": "top", "trace": "trace", "tr V": "trace_V", "m-sharpness": "sharpness"}
_TESTED = ("loss", "top eigenvalue")
_FAINT = 1e-6  # share of a flat density; smaller values are not drawn

Group = dict[Method, list[Measured]]


@dataclass(frozen=True)
class Curvature:
    """The table of minima; cells are text."""

    headers: list[str]
    rows: list[list[str]]  # of cells, the method first
    caption: str
    notes: list[str]
    figures: list[Figure]


def section(folder: Path, found: Summary) -> Curvature | None:
    """Return the table of the runs that were measured, or None where none was."""
    measured, notes = _read(folder, found)
    if not measured:
        return None
    reference = found.plan.reference
    by_seed = {
        column: {method: {one.seed: getattr(one.minimum, name) for one in group} for method, group in measured.items()}
        for column, name in COLUMNS.items()
    }
    tests = [_tests(by_seed[column], reference) for column in _TESTED]
    rows = []
    for method, group in measured.items():
        cells = [_spread(list(values[method].values())) for values in by_seed.values()]
        cells += ["baseline" if method == reference else by_method[method] for by_method in tests]
        rows.append([str(method), str(len(group)), *cells])
    headers = ["method", "n", *COLUMNS, *(f"{name}, difference [95 % CI], p (Holm)" for name in _TESTED)]
    figures = [_slices(measured, found), _spectra(measured, found)]
    return Curvature(headers, rows, _caption(measured, found), notes, figures)


def _read(folder: Path, found: Summary) -> tuple[Group, list[str]]:
    """Return what was measured, by method in the plan's order, and notes on what was not."""
    measured: Group = {method: [] for method in found.plan.methods}
    notes, rough, missing = [], [], 0
    for run in found.records:
        try:
            one = minima.read(folder, run)
        except LabError as error:
            notes.append(str(error))
            continue
        if one is None:
            missing += 1
            continue
        measured[run.method].append(one)
        rough += [] if one.minimum.converged else [f"{one.method} seed {one.seed}"]
    if missing:
        notes.append(f"{missing} finished runs are not measured; `steppe measure` continues.")
    if rough:
        notes.append(f"Not converged (eigenvalue or trace missed its tolerance): {', '.join(rough)}.")
    return {method: group for method, group in measured.items() if group}, notes


def _tests(by_seed: dict[Method, dict[int, float]], reference: Method) -> dict[Method, str]:
    """Return by method the paired test against the reference, with its Holm-corrected p-value, as text."""
    base = by_seed.get(reference, {})
    tests = corrected([None if method == reference else over_seeds(of, base) for method, of in by_seed.items()])
    return {method: NONE if test is None else _told(*test) for method, test in zip(by_seed, tests, strict=True)}


def _told(test: Paired, p: float) -> str:
    ends = NONE if math.isnan(test.low) else f"{_signed(test.low)} to {_signed(test.high)}"
    return f"{_signed(test.difference)} [{ends}], {number(p, '.2g')}"


def _spread(values: list[float]) -> str:
    form = f".{_decimals(mean(values))}f"
    return f"{number(mean(values), form)} ± {number(spread(values), form)}"


def _signed(value: float) -> str:
    """Return three significant digits, without an exponent."""
    return f"{value:+.{_decimals(value)}f}".replace("-", MINUS)


def _decimals(value: float) -> int:
    return min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 2


def _caption(measured: Group, found: Summary) -> str:
    one = next(iter(measured.values()))[0].minimum
    return (
        f"At the final weights, on the {one.n} training examples with the labels they were trained on; weight decay is "
        "not part of the loss. Mean ± standard deviation over n seeds. Top eigenvalue and trace of the loss's Hessian "
        "(Lanczos, residual below 0.1 %; Hutch++, standard error of one run below 5 %); tr V, the trace of the "
        "covariance of the per-example gradients; m-sharpness, the mean rise of the loss in a ball: "
        f"{one.measure}. Differences: method minus {found.plan.reference}, paired by seed, with the 95 % confidence "
        "interval of the mean and the p-value of the paired t-test, Holm-corrected by column."
    )


def _slices(measured: Group, found: Summary) -> Figure:
    data = []
    for method, group in measured.items():
        losses = zip(*(one.slice["loss"] for one in group), strict=True)
        finite = [[loss for loss in column if loss is not None] for column in losses]
        y = [mean(column) if column else None for column in finite]
        data.append(curve(group[0].slice["t"], y, str(method), found.plan.methods.index(method)))
    layout = axes("t, along a random filter-normalised direction", "training loss", yaxis={"type": "log"})
    caption = "Loss at w + t d, each filter of d as long as the model's (Li et al. 2018); log scale, mean over seeds."
    return Figure("slices", "Loss around the minima", caption, data, layout)


def _spectra(measured: Group, found: Summary) -> Figure:
    nodes = [x for group in measured.values() for one in group for x in one.spectrum["node"]]
    low, high = min(nodes), max(nodes)
    width = (high - low) / 200 or 1.0
    grid = [low - 4 * width + i * (high - low + 8 * width) / 400 for i in range(401)]
    data = []
    for method, group in measured.items():
        density = [mean([_smooth(x, one.spectrum, width) for one in group]) for x in grid]
        shown = [value if value > _FAINT / (high - low or 1.0) else None for value in density]
        data.append(curve(grid, shown, str(method), found.plan.methods.index(method)))
    layout = axes("eigenvalue of the Hessian", "density", yaxis={"type": "log"})
    caption = (
        "Stochastic Lanczos quadrature (Ghorbani et al. 2019), 2 probes of 40 steps a run; mean over seeds, smoothed "
        f"by a Gaussian of standard deviation {width:.2g}. Most eigenvalues are near 0; a far peak is a few of many."
    )
    return Figure("spectra", "Hessian spectra", caption, data, layout)


def _smooth(x: float, spectrum: dict[str, list[float]], width: float) -> float:
    rows = zip(spectrum["node"], spectrum["share"], strict=True)
    return sum(w * math.exp(-0.5 * ((x - node) / width) ** 2) for node, w in rows) / (width * math.sqrt(2 * math.pi))


def markdown(table: Curvature) -> str:
    """Return the table as Markdown."""
    text = ["## Minima", "", *tables.grid(table.headers, table.rows), "", tables.escaped(table.caption), ""]
    return "\n".join(text + tables.bullets(table.notes)) + "\n"
