"""The records of the studies in examples/evidence, and the tables of the docs and the README made from them.

``python tools/evidence.py FOLDER`` reads the finished studies in FOLDER and writes docs/records/evidence_STUDY.json;
without a folder it writes the tables between the marks of the pages. docs/results/studies.md says which studies there
are, and in which order; docs/results.md draws them together.
"""

import json
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from marks import between, markdown

from steppe.lab.statistics import Paired, corrected, mean, paired, spread

ROOT = Path(__file__).parents[1]
RECORDS, PAGE, STUDIES = (ROOT / "docs" / name for name in ("records", "results.md", "results/studies.md"))
RADIUS, README = ROOT / "docs" / "how-to" / "radius.md", ROOT / "README.md"
README_ROWS = ("SGD", "SGD, batch 32", "SAM", "WSAM", "m-SAM", "sampled m-SAM")
NAMES = {
    "SAM(m={m})": "m-SAM",
    "SAM(m={m}, sampled=1)": "sampled m-SAM",
    "SAM(m={m}, sampled=1, clip={clip})": "sampled m-SAM, clipped",
    "SAM(ascent={ascent})": "subset ascent",
    "RWSAM": "RW-SAM",
    "ReweightedSharpness": "reweighted sharpness",
    "FSAM": "F-SAM",
    "LateSAM": "late SAM",
}
BASE, SMALLER = "tuned base", "base, quarter of the batch"
ENVIRONMENT = ("steppe", "torch", "python", "cpu", "cores", "threads")
KEPT = ("train_size", "noise", "model", "epochs", "batch_size", "lr", "momentum", "weight_decay", "optimizer")
Record = dict[str, Any]


# ---- from finished studies to records


def collect(folder: Path) -> Record:
    """Return the record of a finished study, with the rows of NAME-rest where that is there."""
    found, rest = _collect(folder), folder.with_name(f"{folder.name}-rest")
    if rest.exists():
        rows, more = found["methods"], _collect(rest)["methods"]
        if any(rows[i]["errors"] != more[i]["errors"] for i in (0, 1)):
            raise SystemExit(f"{rest} has other baselines than {folder}")
        for row in more[2:]:  # the base's epoch was timed once more
            rows.append(row | {"epoch_ms": round(row["epoch_ms"] * rows[0]["epoch_ms"] / more[0]["epoch_ms"], 2)})
    return found


def _collect(folder: Path) -> Record:
    from steppe.lab import notebook, runs
    from steppe.lab.sweep.space import filled

    asked, prices = (json.loads((folder / "comparison.json").read_text())[key] for key in ("asked", "prices"))
    final, fixed, run = errors_by_seed(folder), errors_by_seed(folder / "fixed", whole=False), first_run(folder)
    near = errors_by_seed(folder / "near") if (folder / "near" / "config.json").exists() else {}
    stages = {stage["name"]: stage for stage in runs.stages(folder)}
    rows = []
    for row in notebook.outcomes(folder):
        name, prices_of = row["name"], prices[row["name"]]
        points = runs.best_first(stages[name]["points"])
        kept = {
            key: row[key] for key in ("name", "method", "chosen", "edges", "as_good", "trials", "passes", "collapsed")
        }
        kept |= {"epoch_passes": round(prices_of["passes"], 3), "epoch_ms": round(1000 * prices_of["seconds"], 2)}
        kept |= {"search_passes": round(row["search_passes"]), "search_seconds": round(row["search_seconds"], 1)}
        kept |= {"best_trials": [point["values"] | {"error": round(point["error"], 4)} for point in points[:3]]}
        methods = [str(filled(stages[name]["method"], point["values"])) for point in points[1:3]]
        kept |= {"near_errors": [near[method] for method in methods]} if near else {}
        rows.append(kept | {"errors": final[row["method"]], "fixed_errors": list(fixed.values())[len(rows)]})
    settings = {key: asked["settings"][key] for key in KEPT}
    search = {
        key: asked.get(key) for key in ("trials", "near", "search_seeds", "validation", "equal", "spaces", "draw")
    }
    environment = {key: run["environment"][key] for key in ENVIRONMENT}
    about = {"metric": run["metric"], "settings": settings, "search": search, "environment": environment}
    return about | {"methods": rows}


def errors_by_seed(folder: Path, digits: int = 4, whole: bool = True) -> dict[str, list[float]]:
    """Return the errors of every method by seed, in the plan's order; not whole: of the seeds that all have."""
    from steppe.lab import runs

    plan = runs.read_plan(folder)
    found, problems = runs.finished(folder, plan)
    if problems or (whole and len(found) < len(plan.runs())):
        raise SystemExit(f"{folder} is not finished")
    errors: dict[str, list[float]] = {str(method): [] for method in plan.methods}
    for run, record in sorted(found.items(), key=lambda item: item[0].seed):
        errors[str(run.method)].append(round(record.shown, digits))
    seeds = min(map(len, errors.values()))
    return {method: each[:seeds] for method, each in errors.items()}


def first_run(folder: Path) -> Record:
    """Return the record of one run of a folder, which tells settings, metric and environment of all."""
    found: Record = json.loads(min((folder / "runs").glob("*.json")).read_text())
    return found


# ---- from records to tables


@cache
def record(study: str) -> Record:
    """Return the record of a study, read once."""
    found: Record = json.loads((RECORDS / f"evidence_{study.replace('-', '_')}.json").read_text())
    return found


def label(name: str) -> str:
    """Return a method's name for tables."""
    if "(batch_size=" in name:
        return f"{name.split('(')[0]}, batch {name.split('=')[1].rstrip(')')}"
    return NAMES.get(name, name)


def against(rows: list[Record], other: Record) -> list[tuple[Paired, float] | None]:
    """Return each method's errors minus those of another, paired by seed, with the p-value Holm-corrected by column."""
    return corrected([None if row is other else paired(row["errors"], other["errors"]) for row in rows])


def decimals(found: Record) -> int:
    """Return how many decimals the metric needs: errors in per cent one, others three."""
    return 1 if found["metric"].endswith("%") else 3


def difference(pair: tuple[Paired, float] | None, digits: int) -> str:
    """Return the interval of a difference, bold where it is clear; nothing for none."""
    if pair is None:
        return ""
    test, p = pair
    text = f"{test.low:+.{digits + 1}f} to {test.high:+.{digits + 1}f}"
    return (f"**{text}**" if p < 0.05 else text).replace("-", "\N{MINUS SIGN}")


def _error(row: Record, digits: int) -> str:
    return f"{mean(row['errors']):.{digits}f} ± {spread(row['errors']):.{digits}f}"


def chosen(row: Record) -> str:
    """Return what the search chose, with a mark where it ended at an edge."""
    edges = {edge.split()[0] for edge in row["edges"]}
    return ", ".join(f"{key} {value:g}{' (edge)' if key in edges else ''}" for key, value in row["chosen"].items())


def table(study: str) -> str:
    """Return the table of a study."""
    found = record(study)
    rows, digits = found["methods"], decimals(found)
    others = [f"against {label(rows[i]['name'])}, 95 % CI" for i in (0, 1)]
    heads = ["method", found["metric"], *others, "next two", "as good", "passes", "epoch", "fixed", "chosen"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 2), "---"]]
    columns = _columns(study)
    for i, row in enumerate(rows):
        cells = [label(row["name"]), _error(row, digits)]
        cells += [difference(column[i], digits) for column in columns]
        cells.append(", ".join(f"{mean(errors):.{digits}f}" for errors in row.get("near_errors", [])))
        cells += [
            f"{row['as_good']}" if row["as_good"] is not None else "",
            f"{row['passes']:.0f}",
            f"{row['epoch_ms'] / rows[0]['epoch_ms']:.1f}",
        ]
        lines.append([*cells, f"{mean(row['fixed_errors']):.{digits}f}", chosen(row)])
    return markdown(lines)


def short(study: str, names: tuple[str, ...]) -> str:
    """Return the table of some methods of a study, without what the searches chose."""
    rows, digits = record(study)["methods"], decimals(record(study))
    lines = [["method", "error %, tuned alike", "against SGD, 95 % CI", "passes", "error %, fixed"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row, pair in zip(rows, against(rows, rows[0]), strict=True):
        if label(row["name"]) in names:
            cells = [label(row["name"]), _error(row, digits), difference(pair, digits), f"{row['passes']:.0f}"]
            lines.append([*cells, f"{mean(row['fixed_errors']):.{digits}f}"])
    return markdown(lines)


def overview(studies: dict[str, str], other: int) -> str:
    """Return one table of all studies: what each method changed of the errors of the first row, or of the second.

    An arrow: the search chose about as many epochs as it might, so that a longer training may be better.
    """
    names = list(dict.fromkeys(_title(i, row) for name in studies for i, row in enumerate(record(name)["methods"])))
    reference = names.pop(other)
    lines = [["", reference, *names], ["---", *["---:"] * (1 + len(names))]]
    for study, title in studies.items():
        digits, rows = decimals(record(study)), record(study)["methods"]
        changes = {_title(i, row): _change(test, digits) + (" ↑" if "epochs high" in row["edges"] else "")
                   for i, (row, test) in enumerate(zip(rows, _columns(study)[other], strict=True))}  # fmt: skip
        cells = [title, f"{mean(rows[other]['errors']):.{digits}f}", *(changes.get(name, "") for name in names)]
        lines.append(cells)
    return markdown(lines)


def _title(place: int, row: Record) -> str:
    """Return the name of a row in tables of all studies, whose bases differ."""
    return (BASE, SMALLER)[place] if place < 2 else label(row["name"])


def _change(pair: tuple[Paired, float] | None, digits: int) -> str:
    if pair is None:
        return ""
    text = f"{pair[0].difference:+.{digits + 1}f}".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if pair[1] < 0.05 else text


def summary(studies: Iterable[str]) -> str:
    """Return for each method in how many tasks it is clearly better, not clear, clearly worse than each baseline.

    A task counts once: by the last of its studies that has the method. The mean change is that of the error in per cent
    of the baseline's, with an interval over the tasks, each of which is one number. So the interval holds the luck of
    the searches too. The time of an epoch is the median of its ratio.
    """
    counts: dict[str, tuple[list[list[int]], list[list[float]]]] = {}
    times: dict[str, list[float]] = {}
    for title, study, i in (place for names in by_task(studies) for place in _latest(names)):
        rows = record(study)["methods"]
        times.setdefault(title, []).append(rows[i]["epoch_ms"] / rows[0]["epoch_ms"])
        clear, changes = counts.setdefault(title, ([[0] * 3, [0] * 3], [[], []]))
        for other in (0, 1):
            pair = _columns(study)[other][i]
            if pair is not None:
                clear[other][1 if pair[1] >= 0.05 else 0 if pair[0].difference < 0 else 2] += 1
                changes[other].append(100 * pair[0].difference / mean(rows[other]["errors"]))
    heads = [head for name in (BASE, SMALLER) for head in (f"against the {name}", "mean change, 95 % CI")]
    lines = [["", "tasks", *heads, "time of an epoch"], ["---", *["---:"] * 6]]
    for name in [SMALLER, *(name for name in counts if name not in (BASE, SMALLER)), BASE]:
        clear, changes = counts[name]
        cells = [name, f"{len(times[name])}"]
        for count, found in zip(clear, changes, strict=True):
            cells += ["{} / {} / {}".format(*count), _over_tasks(found)] if found else ["", ""]
        lines.append([*cells, f"{median(times[name]):.1f}"])
    return markdown(lines)


def by_task(studies: Iterable[str]) -> list[list[str]]:
    """Return the studies by their tasks; the name of a longer, second or equal-time study begins with its task's."""
    found: dict[str, list[str]] = {}
    for study in studies:
        found.setdefault(re.sub(r"(-long|-2|-seconds)+$", "", study), []).append(study)
    return list(found.values())


def _latest(studies: list[str]) -> list[tuple[str, str, int]]:
    """Return of each method its title, the last study that has it, and its place there."""
    found = {_title(i, row): (study, i) for study in studies for i, row in enumerate(record(study)["methods"])}
    return [(title, *place) for title, place in found.items()]


@cache
def _columns(study: str) -> tuple[list[tuple[Paired, float] | None], ...]:
    """Return each method's errors minus those of either baseline."""
    rows = record(study)["methods"]
    return tuple(against(rows, rows[i]) for i in (0, 1))


def _over_tasks(changes: list[float]) -> str:
    test = paired(changes, [0.0] * len(changes))
    text = f"{test.difference:+.0f} % ({test.low:+.0f} to {test.high:+.0f})"
    return (f"**{text}**" if test.low > 0 or test.high < 0 else text).replace("-", "\N{MINUS SIGN}")


def with_tables(text: str) -> str:
    """Return docs/results.md with every table made again from the records."""
    every = titles(STUDIES.read_text())
    studies = {equal: at_equal(equal, every) for equal in ("passes", "seconds")}
    for equal in studies:
        text = between(text, f"summary {equal}", summary(studies[equal]))
    for study in ("digits-noise", "fashion-noise-seconds"):
        text = between(text, f"luck {study}", luck(study, f"{study}-2"))
    for equal, i, name in (("passes", 0, "base"), ("passes", 1, "smaller batch"), ("seconds", 0, "seconds")):
        text = between(text, f"overview {name}", overview(studies[equal], i))
    return text


def with_studies(text: str) -> str:
    """Return docs/results/studies.md with the table of every study made again from its record."""
    for study in titles(text):
        text = between(text, f"study {study}", table(study))
    return text


def at_equal(equal: str, studies: dict[str, str]) -> dict[str, str]:
    """Return the studies whose longest runs cost alike in passes, or in seconds."""
    return {name: title for name, title in studies.items() if record(name)["search"]["equal"] == equal}


def luck(first: str, second: str) -> str:
    """Return what two searches of the same methods on one task found, with the same final seeds."""
    before, after = ({row["name"]: row for row in record(study)["methods"]} for study in (first, second))
    digits = decimals(record(first))
    lines = [["method", "first search", "its next two", "second search", "second minus first, 95 % CI", "chosen"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 2), "---"])
    names = [name for name in before if name in after]
    tests = [paired(after[name]["errors"], before[name]["errors"]) for name in names]
    for name, test in zip(names, corrected(tests), strict=True):
        near = ", ".join(f"{mean(errors):.{digits}f}" for errors in before[name].get("near_errors", []))
        cells = [label(name), _error(before[name], digits), near, _error(after[name], digits)]
        lines.append([*cells, difference(test, digits), f"{chosen(before[name])}; {chosen(after[name])}"])
    return markdown(lines)


def radii(studies: dict[str, str]) -> str:
    """Return the radii that the searches at equal passes chose: by method how far they lie apart, and one by one."""
    studies = at_equal("passes", studies)
    found = {name: {label(row["name"]): row for row in record(name)["methods"] if "rho" in row["chosen"]}
             for name in studies}  # fmt: skip
    methods = list(dict.fromkeys(method for rows in found.values() for method in rows))
    lines = [["method", "studies", "lowest", "median", "highest", "within a factor of 2 of the others' median"]]
    lines.append(["---", *["---:"] * 5])
    for method in methods:
        chosen_radii = [rows[method]["chosen"]["rho"] for rows in found.values() if method in rows]
        ends = [f"{each:.2g}" for each in (min(chosen_radii), median(chosen_radii), max(chosen_radii))]
        lines.append([method, f"{len(chosen_radii)}", *ends, f"{_near_the_others(chosen_radii)}"])
    every = [["", *methods], ["---", *["---:"] * len(methods)]]
    every += [[studies[name], *(_radius(rows.get(method)) for method in methods)] for name, rows in found.items()]
    return "\n".join(map(markdown, (lines, every)))


def _near_the_others(radii: list[float]) -> int:
    """Return how many radii lie within a factor of two of the median of the other studies' radii."""
    others = [median(radii[:i] + radii[i + 1 :]) for i in range(len(radii))]
    return sum(0.5 <= each / other <= 2 for each, other in zip(radii, others, strict=True))


def _radius(row: Record | None) -> str:
    if row is None:
        return ""
    near = sorted(trial["rho"] for trial in row["best_trials"])
    size = next((f", {key} {row['chosen'][key]}" for key in ("m", "ascent") if key in row["chosen"]), "")
    return f"{row['chosen']['rho']:.2g}{size} ({near[0]:.2g} to {near[-1]:.2g})"


def titles(text: str) -> dict[str, str]:
    """Return the studies that a page has marks for, with their titles: the headings above the marks."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("<!-- study ") and line.endswith(": begin -->"):
            found[line.removeprefix("<!-- study ").removesuffix(": begin -->")] = heading
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        finished = (path.parent.parent for path in Path(name).glob("*/fixed/config.json"))
        for folder in sorted(path for path in finished if not path.name.endswith("-rest")):
            path = RECORDS / f"evidence_{folder.name.replace('-', '_')}.json"
            path.write_text(json.dumps(collect(folder), indent=1) + "\n")
    STUDIES.write_text(with_studies(STUDIES.read_text()))
    PAGE.write_text(with_tables(PAGE.read_text()))
    README.write_text(between(README.read_text(), "compare", short("digits-noise", README_ROWS)))
    RADIUS.write_text(between(RADIUS.read_text(), "chosen radii", radii(titles(STUDIES.read_text()))))
