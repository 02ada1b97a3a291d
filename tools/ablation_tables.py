"""The record of the ablations of the cheap forms of m-SAM, and their tables in docs/results/ablations.md.

``python tools/ablation_tables.py RESULTS.jsonl ...`` reads what ``examples/evidence/ablations.py`` wrote and writes
docs/records/ablations.json; without a file it writes the tables.
"""

import json
import sys
from pathlib import Path
from typing import Any

from evidence import RECORDS, ROOT, difference
from marks import between, markdown

from steppe.lab.statistics import Paired, corrected, mean, paired, spread

RECORD, PAGE = RECORDS / "ablations.json", ROOT / "docs" / "results" / "ablations.md"
DIGITS, RATES = "digits, 40 % noise", "MNIST-1D"
NORMS = {"ResNet, batch norm": "batch norm", "ResNet, group norm": "group norm"}
REFERENCES = ("SGD", "sampled, m = 16")  # of the table of arms
Arm = dict[str, Any]
Task = dict[str, Arm]


def collect(files: list[Path]) -> dict[str, Task]:
    """Return, by task and arm, the radius that validation chose and the test errors by seed, of seeds that all have."""
    runs: dict[str, dict[str, dict[float, dict[int, Arm]]]] = {}
    for line in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        task, arm, rho, seed = line["key"]
        runs.setdefault(task, {}).setdefault(arm, {}).setdefault(rho, {})[seed] = line
    return {task: _whole(arms) for task, arms in runs.items()}


def _whole(arms: dict[str, dict[float, dict[int, Arm]]]) -> Task:
    seeds = sorted(set.intersection(*(set().union(*by_rho.values()) for by_rho in arms.values())))
    task = {}
    for name, by_rho in arms.items():
        tried = {rho: [found[seed] for seed in seeds] for rho, found in by_rho.items() if set(seeds) <= set(found)}
        best = sorted(tried, key=lambda rho: mean([run["val"] for run in tried[rho]]))
        task[name] = {"passes": round(tried[best[0]][0]["passes"], 3), "rho": best[0]}
        task[name] |= {"errors": [round(run["test"], 2) for run in tried[best[0]]]}
        for rho in best[1:2]:
            task[name] |= {"next_rho": rho, "next_errors": [round(run["test"], 2) for run in tried[rho]]}
        task[name] |= {"first_seed": {f"{rho:g}": round(found[0]["test"], 2) for rho, found in sorted(by_rho.items())}}
    return task


def written(tasks: dict[str, Task]) -> str:
    """Return the record as text, a line an arm."""
    parts = []
    for task, arms in tasks.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(arm)}" for name, arm in arms.items())
        parts.append(f" {json.dumps(task)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def differences(task: Task, pairs: dict[str, str]) -> dict[str, tuple[Paired, float] | None]:
    """Return each arm's errors minus those of its reference, paired by seed, with the Holm-corrected p-value."""
    tests = [paired(task[name]["errors"], task[other]["errors"]) for name, other in pairs.items()]
    return dict(zip(pairs, corrected(tests), strict=True))


def arms(task: Task) -> str:
    """Return the table of the arms at the common batch."""
    names = [name for name in task if ", batch " not in name or name.endswith("batch 16")]
    heads = [f"against {other}, 95 % CI" for other in REFERENCES]
    lines = [["", "error %", *heads, "rho", "next best rho", "passes of a step"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    tests = [differences(task, {name: other for name in names if name != other}) for other in REFERENCES]
    for name in names:
        arm = task[name]
        cells = [name, f"{mean(arm['errors']):.1f} ± {spread(arm['errors']):.1f}"]
        cells += [difference(found.get(name), 1) for found in tests]
        near = f"{arm['next_rho']:g}: {mean(arm['next_errors']):.1f}" if "next_rho" in arm else ""
        lines.append([*cells, f"{arm['rho']:g}" if arm["rho"] else "", near, f"{arm['passes']:.2f}"])
    return markdown(lines)


def grid(rows: dict[str, Task]) -> str:
    """Return a table of tasks by arms: the error, and the interval of the difference from the row's first arm."""
    names = list(next(iter(rows.values())))
    lines = [["", *names], ["---", *["---:"] * len(names)]]
    for title, task in rows.items():
        tests = differences(task, dict.fromkeys(names[1:], names[0]))
        cells = [f"{mean(task[name]['errors']):.1f}" for name in names]
        lines.append([title, cells[0], *(f"{cell}; {difference(tests[name], 1)}"
                                         for name, cell in zip(names[1:], cells[1:], strict=True))])  # fmt: skip
    return markdown(lines)


def ending(task: Task, mark: str) -> Task:
    """Return the arms whose names end with a mark, without it."""
    return {name.removesuffix(mark): arm for name, arm in task.items() if name.endswith(mark)}


def with_tables(text: str) -> str:
    """Return the page's text with the tables of the record."""
    record: dict[str, Task] = json.loads(RECORD.read_text())
    digits = record[DIGITS]
    batches = {f"batch {n}": ending(digits, f", batch {n}") for n in (32, 64, 256)}
    common = {"batch 128": {name: digits[name] for name in batches["batch 32"]}}
    ordered = dict(sorted((batches | common).items(), key=lambda item: int(item[0].split()[1])))
    text = between(text, "ablation arms", arms(digits))
    text = between(text, "ablation batch", grid(ordered))
    rates = {f"learning rate {lr}": ending(record[RATES], f", lr {lr}") for lr in ("0.05", "0.2", "0.4")}
    text = between(text, "ablation rate", grid(rates))
    return between(text, "ablation norm", grid({title: record[name] for name, title in NORMS.items()}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        RECORD.write_text(written(collect([Path(name) for name in sys.argv[1:]])))
    PAGE.write_text(with_tables(PAGE.read_text()))
