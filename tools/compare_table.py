"""The record of the default comparison, and its table in the tutorial.

``python tools/compare_table.py RUNS/compare-digits`` reads a finished ``steppe compare`` and writes
docs/records/compare_digits.json; without a folder it writes the table of the record.
"""

import json
import sys
from pathlib import Path
from typing import Any

from evidence import ENVIRONMENT, chosen, errors_by_seed, first_run, label
from marks import between, markdown

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "records" / "compare_digits.json"
PAGE = ROOT / "docs" / "tutorials" / "fair-comparison.md"
Row = dict[str, Any]


def collect(folder: Path) -> None:
    """Write the record: a row a method, the errors by seed, the environment."""
    from steppe.lab import notebook

    errors, rows = errors_by_seed(folder, digits=3), []
    for row in notebook.outcomes(folder):
        kept = {key: value for key, value in row.items() if key not in ("paper", "rho", "baseline")}
        rows.append(kept | {"errors": errors[row["method"]]})
    environment = {key: first_run(folder)["environment"][key] for key in ENVIRONMENT}
    record = {"command": "steppe compare", "environment": environment, "methods": rows}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def signed(low: float, high: float) -> str:
    """Return an interval, as ``−0.65 to −0.15``."""
    return f"{low:+.2f} to {high:+.2f}".replace("-", "\N{MINUS SIGN}")


def table(rows: list[Row]) -> str:
    """Return the table of a record's methods."""
    heads = ["method", "error %, tuned alike", "against SGD, 95 % CI", "passes", "error %, fixed", "chosen"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        interval = "" if row["low"] is None else signed(row["low"], row["high"])
        cells = [label(row["name"]), f"{row['error']:.1f} ± {row['sd']:.1f}", interval]
        cells += [f"{row['passes']:.0f}", f"{row['fixed_error']:.1f}"]
        lines.append([*cells, chosen(row)])
    return markdown(lines)


def with_table(text: str) -> str:
    """Return the page's text with the table of the record between its marks."""
    return between(text, "compare", table(json.loads(RECORD.read_text())["methods"]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        collect(Path(name))
    PAGE.write_text(with_table(PAGE.read_text()))
