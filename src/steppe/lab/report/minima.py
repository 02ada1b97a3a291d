"""The report's table of minima: what WSAM's Table 9 shows, of every method that was measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steppe.lab import minima
from steppe.lab.minima import Measured
from steppe.lab.report.figures import Figure, colour
from steppe.lab.settings import LabError
from steppe.lab.spec import Method
from steppe.lab.statistics import Paired, holm, mean, paired, spread
from steppe.lab.summary import Summary
from steppe.lab.tables import MINUS, NONE, number
from steppe.measure import Minimum

COLUMNS: dict[str, Callable[[Minimum], float]] = {
    "loss": lambda m: m.loss,
    "top eigenvalue": lambda m: m.top,
    "trace": lambda m: m.trace,
    "tr V": lambda m: m.trace_V,
    "m-sharpness": lambda m: m.sharpness,
}
FAINT = 1e-6  # of a flat density: below, nothing is drawn
TESTED = ("loss", "top eigenvalue")


@dataclass(frozen=True)
class Minima:
    """The table of minima; cells are text."""

    headers: list[str]
    rows: list[tuple[str, bool, list[str]]]  # method, whether it is the baseline, cells
    caption: str
    notes: list[str]
    figures: list[Figure]


def section(folder: Path, found: Summary) -> Minima | None:
    """Return the table of the runs that were measured, or `None` where none was."""
    measured, notes = _read(folder, found)
    if not measured:
        return None
    methods = [method for method in found.plan.methods if measured.get(method)]
    tests = {name: _tests(name, methods, measured, found.plan.reference) for name in TESTED}
    rows = [_row(i, method, measured[method], tests, found) for i, method in enumerate(methods)]
    headers = ["method", "n", *COLUMNS, *(f"{name}, difference [95 % CI], p (Holm)" for name in TESTED)]
    notes += _not_converged(measured)
    figures = [_slices(methods, measured, found), _spectra(methods, measured, found)]
    return Minima(headers, rows, _caption(measured, found), notes, figures)


def _read(folder: Path, found: Summary) -> tuple[dict[Method, list[Measured]], list[str]]:
    measured: dict[Method, list[Measured]] = {}
    notes, missing = [], 0
    for run in found.records:
        try:
            one = minima.read(folder, run)
        except LabError as error:
            notes.append(str(error))
            continue
        if one is None:
            missing += 1
        else:
            measured.setdefault(run.method, []).append(one)
    if missing:
        notes.append(f"{missing} finished runs are not measured; `steppe measure` goes on.")
    return measured, notes


def _tests(
    name: str, methods: list[Method], measured: dict[Method, list[Measured]], reference: Method
) -> list[tuple[Paired | None, float]]:
    by_seed = {m: {one.seed: COLUMNS[name](one.minimum) for one in measured[m]} for m in methods}
    tests: list[Paired | None] = []
    for method in methods:
        seeds = sorted(by_seed[method].keys() & by_seed.get(reference, {}).keys())
        mine = [by_seed[method][s] for s in seeds]
        tests.append(None if method == reference or not seeds else paired(mine, [by_seed[reference][s] for s in seeds]))
    adjusted = holm([math.nan if test is None else test.p for test in tests])
    return list(zip(tests, adjusted, strict=True))


def _row(
    i: int, method: Method, group: list[Measured], tests: dict[str, list[tuple[Paired | None, float]]], found: Summary
) -> tuple[str, bool, list[str]]:
    cells = [str(len(group))]
    for value in COLUMNS.values():
        values = [value(one.minimum) for one in group]
        cells.append(_spread(values))
    baseline = method == found.plan.reference
    cells += ["baseline" if baseline else _test(*tests[name][i]) for name in TESTED]
    return str(method), baseline, cells


def _spread(values: list[float]) -> str:
    decimals = _decimals(mean(values))
    return f"{mean(values):.{decimals}f} ± {number(spread(values), f'.{decimals}f')}".replace("-", MINUS)


def _test(test: Paired | None, p: float) -> str:
    if test is None:
        return NONE
    ends = NONE if math.isnan(test.low) else f"{_three(test.low, '+')} to {_three(test.high, '+')}"
    return f"{_three(test.difference, '+')} [{ends}], {number(p, '.2g')}"


def _three(value: float, sign: str = "") -> str:
    """Three significant digits, without an exponent."""
    return f"{value:{sign}.{_decimals(value)}f}".replace("-", MINUS)


def _decimals(value: float) -> int:
    return min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 2


def _caption(measured: dict[Method, list[Measured]], found: Summary) -> str:
    one = next(iter(measured.values()))[0].minimum
    return (
        f"At the final weights, on the {one.n} training examples with the labels they were trained on; weight decay is "
        "not part of the loss. Mean ± standard deviation over n seeds. Top eigenvalue and trace of the loss's Hessian "
        "(Lanczos, residual below 0.1 %; Hutch++, standard error of one run below 5 %); tr V, the trace of the "
        f"covariance of the examples' gradients; m-sharpness, the mean rise of the loss in a ball: {one.measure}. "
        f"Differences: method minus {found.plan.reference}, paired by seed, with the 95 % confidence interval of the "
        "mean and the p-value of the paired t-test, Holm-corrected by column."
    )


def _not_converged(measured: dict[Method, list[Measured]]) -> list[str]:
    rough = [
        f"{one.method} seed {one.seed}" for group in measured.values() for one in group if not one.minimum.converged
    ]
    return [f"Not converged (eigenvalue or trace missed its tolerance): {', '.join(rough)}."] if rough else []


def _slices(methods: list[Method], measured: dict[Method, list[Measured]], found: Summary) -> Figure:
    data = []
    for method in methods:
        rows = [one.slice for one in measured[method]]
        columns = [[v for v in column if v is not None] for column in zip(*(row["loss"] for row in rows), strict=True)]
        line = {"color": colour(found, method), "width": 2}
        trace = {"x": rows[0]["t"], "y": [mean(c) if c else None for c in columns], "name": str(method), "line": line}
        data.append(trace | {"mode": "lines", "hovertemplate": "%{y:.3g}"})
    layout = {
        "xaxis": {"title": {"text": "t, along a random filter-normalised direction"}},
        "yaxis": {"title": {"text": "training loss"}, "type": "log"},
    }
    caption = (
        "Loss at w + t d, each filter of d as long as the model's (Li et al. 2018); geometric scale, mean over seeds."
    )
    return Figure("slices", "Loss around the minima", caption, data, layout)


def _spectra(methods: list[Method], measured: dict[Method, list[Measured]], found: Summary) -> Figure:
    nodes = [x for method in methods for one in measured[method] for x in one.spectrum["node"]]
    low, high = min(nodes), max(nodes)
    width = (high - low) / 200 or 1.0
    grid = [low - 4 * width + i * (high - low + 8 * width) / 400 for i in range(401)]
    data = []
    for method in methods:
        group = [one.spectrum for one in measured[method]]
        y = [mean([_smooth(x, each, width) for each in group]) for x in grid]
        line = {"color": colour(found, method), "width": 2}
        shown = [value if value > FAINT / (high - low or 1.0) else None for value in y]
        data.append({"x": grid, "y": shown, "name": str(method), "line": line, "mode": "lines"})
    layout = {
        "xaxis": {"title": {"text": "eigenvalue of the Hessian"}},
        "yaxis": {"title": {"text": "density"}, "type": "log"},
    }
    caption = (
        "Stochastic Lanczos quadrature (Ghorbani et al. 2019), 2 probes of 40 steps a run; mean over seeds, smoothed "
        f"by a Gaussian of standard deviation {width:.2g}. Most eigenvalues are near 0; a far peak is a few of many."
    )
    return Figure("spectra", "Hessian spectra", caption, data, layout)


def _smooth(x: float, spectrum: dict[str, list[float]], width: float) -> float:
    rows = zip(spectrum["node"], spectrum["share"], strict=True)
    return sum(w * math.exp(-0.5 * ((x - node) / width) ** 2) for node, w in rows) / (width * math.sqrt(2 * math.pi))


def markdown(table: Minima) -> str:
    """Return the table as Markdown."""
    lines = [table.headers, ["---"] + ["---:"] * (len(table.headers) - 1)]
    lines += [[name, *cells] for name, _, cells in table.rows]
    text = ["## Minima", "", *("| " + " | ".join(cells) + " |" for cells in lines), "", table.caption, ""]
    return "\n".join(text + [f"- {note}" for note in table.notes]) + "\n"
