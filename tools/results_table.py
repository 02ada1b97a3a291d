"""Turn finished laptop recipes into records, and the records into the tables of docs/results/recipes.md.

``python tools/results_table.py RUNS`` reads RUNS/RECIPE-laptop/STUDY and writes docs/records/RECIPE_laptop.json;
``python tools/results_table.py`` writes the tables between the markers of docs/results/recipes.md.
"""

import json
import sys
from pathlib import Path
from typing import Any

from steppe.lab import report
from steppe.lab.statistics import Paired, corrected, mean, over_seeds, spread
from steppe.lab.tables import plain

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "docs" / "records", ROOT / "docs" / "results" / "recipes.md"
KEPT = ("title", "baseline", "seeds", "settings")
ROW = ("method", "errors", "passes", "seconds", "collapsed")


def collect(runs: Path) -> None:
    """Write a record for every recipe whose studies have finished."""
    for folder in sorted(runs.glob("*-laptop")):
        studies = [record_of(study) for study in sorted(folder.iterdir()) if (study / "summary.md").exists()]
        if studies:
            path = RECORDS / f"{folder.name.removesuffix('-laptop')}_laptop.json"
            path.write_text(json.dumps(studies, indent=1) + "\n")


def record_of(folder: Path) -> dict[str, Any]:
    """Return one study: errors by method and seed, the points and choices of its search, the environment."""
    found = report.read(folder)
    data = plain(found)
    rows = [{key: _short(row[key]) for key in ROW} for row in data["methods"]]
    stages = [
        {"name": stage["name"], "chosen": stage["chosen"], "points": [_point(point) for point in stage["points"]]}
        for stage in data["search"].get("stages", [])
    ]
    kept = {key: data[key] for key in KEPT}
    about = {"study": folder.name, "values": data["recipe"].get("values", {}), "search": stages}
    return kept | about | {"environment": report.environment(found), "methods": rows}


def _point(point: dict[str, Any]) -> list[Any]:
    """Return a point's values and validation error, and "dropped" for a dropped point."""
    return [*point["values"].values(), _short(point["error"]), *(["dropped"] if point["dropped"] else [])]


def _short(value: Any) -> Any:
    """Round numbers to four decimals."""
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def tables(name: str) -> str:
    """Return a recipe's studies as Markdown."""
    return "\n".join(table(study) for study in json.loads((RECORDS / f"{name}_laptop.json").read_text()))


def table(study: dict[str, Any]) -> str:
    """Return one study: every method against the first, and against SAM where it took part."""
    rows = study["methods"]
    base, sam = rows[0], next((row for row in rows if row["method"].startswith("SAM(")), None)
    versus = [base] if sam in (None, base) or _many_sams(rows) else [base, sam]
    columns = [_against(rows, other) for other in versus]
    heads = [f"against {other['method']}, 95 % CI (p)" for other in versus]
    lines = [f"**{study['study']}**: {study['title']}", ""]
    lines += [f"| method | n | error % | {' | '.join(heads)} | passes |", f"|---|---|---|{'---|' * (len(heads) + 1)}"]
    for i, row in enumerate(rows):
        errors = list(row["errors"].values())
        fallen = f", {row['collapsed']} collapsed" if row["collapsed"] else ""
        error = f"{mean(errors):.2f} ± {spread(errors):.2f}{fallen}"
        tests = " | ".join(column[i] for column in columns)
        lines.append(f"| {row['method']} | {len(errors)} | {error} | {tests} | {row['passes']:.0f} |")
    return "\n".join(lines).replace("-0.00", "0.00") + "\n"


def _many_sams(rows: list[dict[str, Any]]) -> bool:
    return sum(row["method"].startswith("SAM(") for row in rows) > 1


def _against(rows: list[dict[str, Any]], other: dict[str, Any]) -> list[str]:
    """Return the paired difference of every row to one, its interval and its Holm-corrected p-value."""
    tests = corrected([None if row is other else over_seeds(row["errors"], other["errors"]) for row in rows])
    return ["" if test is None else _told(*test) for test in tests]


def _told(test: Paired, p: float) -> str:
    return f"{test.low:+.2f} to {test.high:+.2f} ({p:.2g})" if p == p else "the same in every seed"


def with_tables(text: str) -> str:
    """Return the page with its tables made again from the records."""
    parts = text.split("<!-- table: ")
    for i, part in enumerate(parts[1:], start=1):
        name, rest = part.split(" -->\n", 1)
        parts[i] = f"{name} -->\n\n{tables(name)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return "<!-- table: ".join(parts)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    else:
        PAGE.write_text(with_tables(PAGE.read_text()))
