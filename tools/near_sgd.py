"""Two records about sampled m-SAM, and their tables in docs/near-sgd.md.

``python tools/near_sgd.py judge noisy=FOLDER clean=FOLDER`` reads finished ``steppe compare`` on the ResNet of
``benchmarks/near_sgd_resnet.py`` and writes docs/records/near_sgd_resnet.json. ``python tools/near_sgd.py variants
RESULTS.jsonl ...`` reads what ``benchmarks.near_sgd_variants`` has written and writes
docs/records/near_sgd_variants.json. Without arguments it writes the tables.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from evidence import errors_by_seed, first_run
from marks import between

from steppe.lab.statistics import paired

ROOT = Path(__file__).parents[1]
PAGE, RECORDS = ROOT / "docs" / "near-sgd.md", ROOT / "docs" / "records"
JUDGE, VARIANTS = RECORDS / "near_sgd_resnet.json", RECORDS / "near_sgd_variants.json"
TIMES = ROOT / "benchmarks" / "records" / "near_sgd_resnet_cpu.json"
NAMES = {
    "SGD": ("SGD", "base", None),
    "SGD(batch_size=32)": ("SGD, batch 32", None, None),
    "SAM(rho={rho})": ("SAM", "sam", None),
    "SAM(rho={rho}, m=16)": ("m-SAM, all of m = 16", "serial", 16),
    "SAM(rho={rho}, m=16, sampled=1)": ("sampled m-SAM, m = 16", "sampled", 16),
    "SAM(rho={rho}, ascent=16)": ("ascent on 16", "ascent", 16),
}
FULL = "SAM(rho={rho}, m=16)"
HEAD = ("method", "error %, tuned alike", "against all of m = 16", "chosen", "error %, fixed", "against all of m = 16")
HEAD += ("CPU time of a step",)


def judge(folders: dict[str, Path]) -> None:
    """Write the record of the comparisons: chosen values and errors by seed, tuned and at fixed parameters.

    FOLDER-equal has the sampled form at what was chosen for the full one, by ``steppe compare --fixed``.
    """
    from steppe.lab import notebook

    tasks: dict[str, Any] = {}
    for name, folder in folders.items():
        tuned, fixed = (errors_by_seed(where, digits=2) for where in (folder, folder / "fixed"))
        rows = []
        for row in notebook.outcomes(folder):
            kept = {key: row[key] for key in ("name", "chosen", "edges", "passes")} | {"errors": tuned[row["method"]]}
            rows.append(kept | {"errors_fixed": next((fixed[key] for key in fixed if same(key, row["name"])), [])})
        equal = errors_by_seed(folder.with_name(f"{folder.name}-equal"), digits=2)
        asked = json.loads((folder / "comparison.json").read_text())["asked"]
        tasks[name] = {"asked": asked, "environment": first_run(folder)["environment"], "rows": rows, "equal": equal}
    JUDGE.write_text(json.dumps(tasks, indent=1) + "\n")


def same(method: str, name: str) -> bool:
    """Tell whether a trained method is that of a spec with holes."""
    kept = lambda text: sorted(  # noqa: E731
        part
        for part in text.replace("(", ", ").rstrip(")").split(", ")
        if part.split("=")[0] not in ("lr", "epochs", "rho")
    )
    return kept(method) == kept(name)


def against(a: list[float], b: list[float]) -> str:
    """Return the mean paired difference with its 95 % confidence interval."""
    found = paired(a, b)
    return f"{found.difference:+.1f} ± {(found.high - found.low) / 2:.1f}".replace("-", "\N{MINUS SIGN}")


def judge_table() -> str:
    """Return a table a task of the ResNet."""
    times = {(row["way"], row["m"]): row for row in json.loads(TIMES.read_text())["rows"]}
    lines = []
    for task, found in json.loads(JUDGE.read_text()).items():
        rows = {row["name"]: row for row in found["rows"]}
        lines += [
            f"{'40 % label noise' if task == 'noisy' else 'Clean labels'}:\n",
            f"| {' | '.join(HEAD)} |",
            "|---|---:|---:|---|---:|---:|---:|",
        ]
        for name, row in rows.items():
            shown, way, m = NAMES[name]
            full = rows[FULL]
            cells = [shown, f"{mean(row['errors']):.1f}"]
            cells += ["" if name == FULL else against(row["errors"], full["errors"])]
            cells += [", ".join(f"{key} {value}" for key, value in row["chosen"].items())]
            fixed = row["errors_fixed"]
            cells += [f"{mean(fixed):.1f}" if fixed else ""]
            cells += ["" if name == FULL or not fixed else against(fixed, full["errors_fixed"])]
            cells += [f"{times[way, m]['ratio']:.2f}" if way else ""]
            lines.append(f"| {' | '.join(cells)} |")
        (equal,) = found["equal"].values()
        lines += ["", f"Sampled m-SAM at the values and length chosen for all of m = 16: {mean(equal):.1f}, "]
        lines[-1] += f"{against(equal, rows[FULL]['errors'])}.\n"
    return "\n".join(lines)


def collect(files: list[Path]) -> None:
    """Write the record of the variants: by task, what validation chose, and the test errors by seed."""
    runs: dict[str, dict[str, dict[tuple[float, float], dict[int, Any]]]] = {}
    for run in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        of = runs.setdefault(run["task"], {}).setdefault(run["variant"], {})
        of.setdefault((run["rho"], run["rate"]), {})[run["seed"]] = run
    record: dict[str, Any] = {}
    for task, variants in runs.items():
        for variant, tried in variants.items():
            seeds = set.intersection(*(set(found) for found in tried.values()))
            if len(seeds) < 2:
                continue
            rho, rate = min(tried, key=lambda key: mean(tried[key][seed]["val"] for seed in seeds))
            best = [tried[rho, rate][seed] for seed in sorted(seeds)]
            record.setdefault(task, {})[variant] = {
                "rho": rho, "rate": rate, "passes": round(best[0]["passes"], 3), "epochs": best[0]["epochs"],
                "errors": [round(run["test"], 2) for run in best],
            }  # fmt: skip
    lines = [
        f" {json.dumps(task)}: {{\n  "
        + ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items())
        + "\n }"
        for task, rows in record.items()
    ]
    VARIANTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def variants_table() -> str:
    """Return one table of all tasks."""
    record = json.loads(VARIANTS.read_text())
    names = list(dict.fromkeys(name for rows in record.values() for name in rows))
    lines = ["| | passes | " + " | ".join(record) + " |", "|---|---:|" + "---:|" * len(record)]
    for name in names:
        cells = [rows.get(name) for rows in record.values()]
        passes = next(cell["passes"] for cell in cells if cell)
        lines.append(f"| {name} | {passes:.2f} | " + " | ".join(map(cell_of, cells)) + " |")
    return "\n".join(lines) + "\n"


def cell_of(cell: dict[str, Any] | None) -> str:
    """Return mean and deviation of the errors, and the radius."""
    if cell is None:
        return ""
    radius = f" ({cell['rho']:g})" if cell["rho"] else ""
    return f"{mean(cell['errors']):.1f} ± {stdev(cell['errors']):.1f}{radius}"


def with_tables(text: str) -> str:
    """Return the page's text with the tables of the records."""
    return between(between(text, "judge", judge_table()), "variants", variants_table())


if __name__ == "__main__":
    if sys.argv[1:2] == ["judge"]:
        judge({name: Path(folder) for name, _, folder in (word.partition("=") for word in sys.argv[2:])})
    elif sys.argv[1:2] == ["variants"]:
        collect([Path(name) for name in sys.argv[2:]])
    PAGE.write_text(with_tables(PAGE.read_text()))
