"""Write the tables of the committed records between a text's marks: ``python -m benchmarks.table FILE...``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

RECORDS = Path(__file__).parent / "records"
BEGIN, END = "<!-- benchmarks: begin -->\n", "<!-- benchmarks: end -->\n"
WAYS = {"serial": "serial loop", "vmap": "`vmap`", "parallel": "steppe, two passes"}
PROBES = {"rw_exact": "exact norms", "rw_difference": "finite difference"}
PYTHON_AT = 8  # the m at which the share of Python is shown
UNLIKE = """\
The two do not do the same work. steppe takes norms that show a gradient that is not finite before anything changes:
one more than the other package in SAM, WSAM and Coupled-WSAM, two in F-SAM, three in ASAM; one norm takes {norms}.
It also counts skipped steps. The other package's FriendlySAM writes its momentum before the second pass, so a step
that fails there has changed it; steppe writes a method's memory after the step has succeeded, which takes the third
copy. The other package's GSAM and WSAM restore the weights by a subtraction, which is not exact. Its LookSAM takes two
passes at every step and projects tensor by tensor. Its ASAM has no `eta` and scales biases too.
"""
Row = dict[str, Any]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table whose first two columns are names."""
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def ratio(row: Row | None) -> str:
    """Return the median and range, as ``0.92 (0.90 to 0.95)``, or a dash for what was not run."""
    if row is None or row["ratio"] is None:
        return "-"
    digits = 2 if row["ratio"] < 10 else 0
    return f"{row['ratio']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def memory(row: Row | None) -> str:
    """Return the ratio of peak memory, or a dash."""
    return "-" if row is None or row["ratio"] is None else f"{row['peak_ratio']:.2f}"


def by_m(rows: list[Row], ways: Sequence[str], shown: Callable[[Row | None], str]) -> str:
    """Return a table with a row for each model and way, and a column for each m."""
    ms = sorted({row["m"] for row in rows if row["m"]})
    found = {(row["model"], row["way"], row["m"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for way in (w for w in ways if any((model, w, m) in found for m in ms)):
            lines.append([model, WAYS[way], *(shown(found.get((model, way, m))) for m in ms)])
    return markdown(["model", "m-SAM", *(f"m = {m}" for m in ms)], lines)


def sam_itself(rows: list[Row]) -> str:
    """Return the table of SAM's own time and memory, with RW-SAM's ratios."""
    found = {(row["model"], row["way"]): row for row in rows if row["m"] is None}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        sam = found[model, "sam"]
        size = f"{sam['parameters'] / 1e6:.2f} M, batch {sam['batch_size']}"
        rw = [ratio(found.get((model, way))) for way in PROBES]
        lines.append([model, size, f"{sam['ms']:.1f} ms", f"{sam['peak'] / 2**20:.0f} MiB", *rw])
    return markdown(["model", "size", "SAM's step", "SAM's memory", *(f"RW-SAM, {p}" for p in PROBES.values())], lines)


def by_python(rows: list[Row]) -> str:
    """Return the table of what shared passes intercept, and of the share of a step that Python takes."""
    found = {(row["model"], row["way"], row["m"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        shared = found.get((model, "parallel", PYTHON_AT)) or {}
        if "functions" in shared:
            both = [f"{100 * row['outside']:.0f} %" for row in (found[model, "sam", None], shared)]
            lines.append([model, f"m = {PYTHON_AT}", str(shared["functions"]), str(shared["sites"]), *both])
    return markdown(["model", "m-SAM", "functions", "uses of parameters", "outside, SAM", "outside, m-SAM"], lines)


def where(data: dict[str, Any]) -> str:
    """Name the machine and the settings that matter."""
    m, s = data["machine"], data["settings"]
    threads = f"{m['threads']} of {m['cores']} cores, " if m["device"] == "cpu" else ""
    name = f"CPU, {m['cpu']}" if m["device"] == "cpu" else m["device"]
    kept = m.get("allocator") if m["device"] == "cpu" else None
    said = [f"torch {m['torch']}", m["date"], *filter(None, [s.get("dtype"), s.get("note"), kept])]
    return f"{name}, {threads}{', '.join(said)}"


def m_sam(data: dict[str, Any]) -> str:
    """Return the tables of time and memory of m-SAM and RW-SAM."""
    rows = data["rows"]
    return (
        f"{where(data)}. SAM itself, and RW-SAM's step time as a ratio to SAM's:\n\n{sam_itself(rows)}\n"
        f"Step time of m-SAM as a ratio to SAM's, median (range) of at most {data['settings']['rounds']} "
        f"rounds:\n\n{by_m(rows, list(WAYS), ratio)}\n"
        f"Peak memory of m-SAM beyond the parameters, as a ratio to SAM's:\n\n{by_m(rows, list(WAYS), memory)}\n"
        "How many torch functions a step in shared passes intercepts, how many uses of parameters it records, and "
        f"which share of a step's time passes outside torch's operators, by its profiler:\n\n{by_python(rows)}\n"
    )


def step_cost(data: dict[str, Any]) -> str:
    """Return the table of what a method's own algebra costs, beside the other package."""
    other = data["settings"]["other"]
    found = {(row["shapes"], row["method"], row["by"]): row for row in data["rows"]}
    lines = []
    for shapes, method in dict.fromkeys((row["shapes"], row["method"]) for row in data["rows"]):
        pair = [found.get((shapes, method, by)) for by in ("steppe", other)]
        times = [f"{row['ms']:.1f} ({row['low']:.1f} to {row['high']:.1f})" if row else "-" for row in pair]
        extra = [f"{row[key]:.{d}f}" if row else "-" for key, d in (("copies", 1), ("passes", 1)) for row in pair]
        lines.append([shapes, method, *times, *extra])
    other = other or "another"
    norm = {row["shapes"]: row["norm_ms"] for row in data["rows"] if "norm_ms" in row}
    norms = ", ".join(f"{ms:.1f} ms on {shapes}" for shapes, ms in norm.items()) or "some time"
    head = ["parameters of", "method", "ms, steppe", f"ms, {other}", "copies", "copies, other", "passes", "other"]
    return (
        f"{where(data)}. Median (range) of {data['settings']['rounds']} rounds:\n\n"
        f"{markdown(head, lines)}\n{UNLIKE.format(norms=norms)}\n"
    )


NEAR_SGD = {"sampled": "`sampled=1`", "ascent": "`ascent=m`", "m_sam": "m-SAM, all micro-batches"}
NEAR_SGD["serial"] = "the same, in a loop"


def near_sgd(data: dict[str, Any]) -> str:
    """Return the table of what a step costs beside the base optimizer's own."""
    rows = data["rows"]
    ms = sorted({row["m"] for row in rows if row["m"]})
    found = {(row["model"], row["way"], row["m"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = found[model, "base", None]
        size = f"{own['parameters'] / 1e6:.2f} M, {own['ms']:.1f} ms"
        lines.append([f"{model} ({size})", "SAM", ratio(found[model, "sam", None]), *["" for _ in ms[1:]]])
        for way in (w for w in NEAR_SGD if any((model, w, m) in found for m in ms)):
            lines.append([model, NEAR_SGD[way], *(beside_passes(found.get((model, way, m))) for m in ms)])
    time = "CPU time" if data["settings"].get("cpu_time") else "Time"
    return (
        f"{where(data)}. {time} of a step as a ratio to the base optimizer's own step (SGD with momentum) on the same "
        f"batch of {rows[0]['batch_size']}, median (range) of at most {data['settings']['rounds']} rounds; in brackets "
        f"the passes that it counts.\n\n{markdown(['model', 'way', *(f'm = {m}' for m in ms)], lines)}\n"
    )


def beside_passes(row: Row | None) -> str:
    """Return the ratio and the passes that the step counts."""
    return "-" if row is None else f"{ratio(row)} [{row['passes']:.2f}]"


def tables(records: Path = RECORDS) -> str:
    """Return the tables of every record, those of m-SAM first."""
    found = [record.read(path) for path in sorted(records.glob("*.json"))]
    sections = {
        "m_sam": ("## SAM, m-SAM and RW-SAM", m_sam),
        "near_sgd": ("## Sampled m-SAM and ascent on a subset beside the base's own step", near_sgd),
        "step_cost": ("## What each method's own algebra costs", step_cost),
    }
    made = []
    for benchmark, (head, write) in sections.items():
        shown = [write(data).rstrip("\n") + "\n" for data in found if data["benchmark"] == benchmark]
        made += [head + "\n", *shown] if shown else []
    return "\n".join(made)


def with_table(text: str, records: Path = RECORDS) -> str:
    """Return the text with the tables between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables(records) + END + rest.split(END)[1]


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text()))
