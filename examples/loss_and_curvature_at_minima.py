"""Compare loss and top Hessian eigenvalue where vanilla training, SAM and WSAM end (WSAM's Table 9).

First train and measure:

    steppe compare --fixed --seeds 10 --out runs/minima --method SGD --method 'SAM(rho=0.2)' --method 'SAM(rho=0.5)' \\
        --method 'WSAM(rho=0.5, gamma=0.9)' --method 'SAM(rho=0.2, m=8)'
    steppe measure runs/minima

Then ``python examples/loss_and_curvature_at_minima.py runs/minima`` copies the measurements into
``docs/records/minima.json``. Without a directory it prints the table of that record; ``--figure FILE.svg`` draws its
slices (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from steppe.lab import minima, runs
from steppe.lab.statistics import paired

RECORD = Path(__file__).parents[1] / "docs" / "records" / "minima.json"
KEYS = {"loss": "loss", "top": "top eigenvalue", "trace": "trace", "trace_V": "tr V", "sharpness": "m-sharpness"}
PAIRS = [
    ("SAM(rho=0.2)", "SGD"),
    ("SAM(rho=0.5)", "SGD"),
    ("WSAM(rho=0.5, gamma=0.9)", "SGD"),
    ("WSAM(rho=0.5, gamma=0.9)", "SAM(rho=0.5)"),
]


def collected(folder: Path) -> dict[str, Any]:
    """Return the measurements of a directory's runs, and what all of them share once."""
    plan = runs.read_plan(folder)
    rows, measured = [], []
    for run, ended in runs.finished(folder, plan)[0].items():
        found = minima.read(folder, run)
        if found is None:
            raise SystemExit(f"{run.method} seed {run.seed} is not measured: run `steppe measure {folder}`")
        measured.append(found)
        numbers = {k: v if isinstance(v, str | bool | int) else round(v, 6) for k, v in asdict(found.minimum).items()}
        numbers.pop("measure")
        rows.append({"method": found.method, "seed": found.seed, "test_error": round(ended.test_error, 6), **numbers})
    shared = {"settings": plan.settings.to_dict(), "measure": measured[0].minimum.measure}
    return shared | {"environment": measured[-1].environment, "rows": rows, "slices": slices(measured)}


def slices(measured: Sequence[minima.Measured]) -> dict[str, list[float]]:
    """Return the loss along the random direction by method, mean over seeds."""
    found: dict[str, list[float]] = {"t": list(minima.STEPS)}
    for method in dict.fromkeys(one.method for one in measured):
        lines = zip(*(one.slice["loss"] for one in measured if one.method == method), strict=True)
        found[method] = [round(mean(column), 4) for column in lines]
    return found


def table(record: dict[str, Any]) -> str:
    """Return mean and standard deviation of every method, and four paired differences, as Markdown."""
    lines = ["| method | n | " + " | ".join([*KEYS.values(), "test error %"]) + " |"]
    lines.append("|---" * (len(KEYS) + 3) + "|")
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    for method, rows in by_method.items():
        cells = [spread([row[key] for row in rows]) for key in KEYS]
        cells.append(spread([100 * row["test_error"] for row in rows]))
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    lines += ["", "| difference, paired | loss | top eigenvalue |", "|---|---|---|"]
    for one, other in PAIRS:
        cells = []
        for key in ("loss", "top"):
            test = paired([row[key] for row in by_method[one]], [row[key] for row in by_method[other]])
            cells.append(f"{test.difference:+.3g} [{test.low:+.3g}, {test.high:+.3g}], p = {test.p:.1g}")
        lines.append(f"| {one} - {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and standard deviation, to three and two digits."""
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def figure(record: dict[str, Any], path: Path) -> None:
    """Draw the loss along the random direction."""
    import matplotlib.pyplot as plt

    drawn, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    lines = dict(record["slices"])
    t = lines.pop("t")
    for method, loss in lines.items():
        axis.plot(t, loss, label=method)
    axis.set(xlabel="t, along a random filter-normalised direction", ylabel="training loss", yscale="log")
    axis.legend()
    drawn.savefig(path)


def main() -> None:
    """Collect, print or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a run directory that was measured")
    parser.add_argument("--figure", type=Path, help="draw the record")
    options = parser.parse_args()
    if options.folder is not None:
        record = collected(options.folder)
        head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=1)
        rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
        RECORD.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    record = json.loads(RECORD.read_text())
    if options.figure is not None:
        figure(record, options.figure)
    print(table(record))


if __name__ == "__main__":
    main()
