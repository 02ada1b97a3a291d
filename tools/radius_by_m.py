"""The radius and m: a record of finished comparisons, and the tables of docs/how-to/radius.md.

``python tools/radius_by_m.py TITLE=FOLDER ...`` reads directories of ``steppe compare --fixed`` whose methods are
``SAM(rho=..., m=...)`` and writes docs/records/radius_by_m.json; without arguments it writes the tables.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from evidence import errors_by_seed, first_run
from marks import between

ROOT = Path(__file__).parents[1]
RECORD, PAGE = ROOT / "docs" / "records" / "radius_by_m.json", ROOT / "docs" / "how-to" / "radius.md"
SETTINGS = (
    "data",
    "train_size",
    "noise",
    "model",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "image_size",
)


def collect(title: str, folder: Path) -> dict[str, Any]:
    """Return the errors of every method of a comparison, in per cent, by seed."""
    run = first_run(folder)
    settings, environment = run["settings"], run["environment"]
    return {
        "task": title,
        "settings": {key: settings[key] for key in SETTINGS},
        "environment": {key: environment[key] for key in ("steppe", "torch", "python", "cpu")},
        "errors": dict(sorted(errors_by_seed(folder, digits=2).items())),
    }


def table(study: dict[str, Any]) -> str:
    """Return mean errors by m and rho; the best of each m in bold."""
    cells: dict[str, dict[float, float]] = {}
    for method, errors in study["errors"].items():
        if found := re.fullmatch(r"SAM\(rho=([\d.]+), m=(\w+)\)", method):
            cells.setdefault(found[2], {})[float(found[1])] = sum(errors) / len(errors)
    radii, batch = sorted({rho for row in cells.values() for rho in row}), study["settings"]["batch_size"]
    sgd, seeds = study["errors"]["SGD"], max(map(len, study["errors"].values()))
    lines = [
        f"{study['task']}; SGD {sum(sgd) / len(sgd):.1f}; {seeds} seeds:\n",
        "| m | " + " | ".join(f"rho = {rho}" for rho in radii) + " |",
        "|---|" + "---:|" * len(radii),
    ]
    for m, row in sorted(cells.items(), key=lambda item: batch if item[0] == "None" else int(item[0])):
        best = min(row.values())
        shown = (f"**{row[rho]:.1f}**" if row[rho] == best else f"{row[rho]:.1f}" for rho in radii)
        lines.append(f"| {f'{batch}, the batch' if m == 'None' else m} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """Return the page's text with the tables of the record."""
    return between(text, "radius by m", "\n".join(map(table, json.loads(RECORD.read_text()))))


if __name__ == "__main__":
    if sys.argv[1:]:
        studies = [collect(title, Path(folder)) for title, _, folder in (word.partition("=") for word in sys.argv[1:])]
        RECORD.write_text("[\n " + ",\n ".join(map(json.dumps, studies)) + "\n]\n")
    PAGE.write_text(with_tables(PAGE.read_text()))
