"""Write the tables of the committed records between a text's marks: ``python -m benchmarks.table FILE...``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

RECORDS = Path(__file__).parent / "records"
BEGIN, END = "<!-- benchmarks: begin -->\n", "<!-- benchmarks: end -->\n"
SUMMARY_BEGIN, SUMMARY_END = "<!-- summary: begin -->\n", "<!-- summary: end -->\n"
WAYS = {"serial": "one after the other", "vmap": "`vmap`", "parallel": "steppe, two passes"}
PROBES = {"rw_exact": "exact norms", "rw_difference": "finite difference"}
UNLIKE = """\
What the other implementation leaves out: norms that tell of a gradient that is not finite before anything is
changed (SAM, WSAM and Coupled-WSAM take one more than it, F-SAM two, ASAM three; one takes {norms}), and
skipped steps. Its FriendlySAM writes its momentum before the second pass, so that a step that fails there has
changed it; steppe writes what a method remembers once the step has succeeded, which takes the third copy. Its
GSAM and WSAM come back to the weights by a subtraction, not bit for bit. Its LookSAM takes two passes at every
step and projects tensor by tensor. Its ASAM has no `eta` and adapts biases too.
"""
Row = dict[str, Any]


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; the first two columns are names."""
    rule = ["---"] * 2 + ["---:"] * (len(head) - 2)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def ratio(row: Row | None) -> str:
    """``0.92 (0.90-0.95)``: median and range; a dash for what was not run."""
    if row is None or row["ratio"] is None:
        return "-"
    digits = 2 if row["ratio"] < 10 else 0
    return f"{row['ratio']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def memory(row: Row | None) -> str:
    """Peak memory as a ratio."""
    return "-" if row is None or row["ratio"] is None else f"{row['peak_ratio']:.2f}"


def work(row: Row | None) -> str:
    """Counted work as a ratio."""
    return f"{row['flops_ratio']:.2f}" if row and row.get("flops_ratio") else "-"


def by_m(rows: list[Row], ways: Sequence[str], shown: Callable[[Row | None], str]) -> str:
    """Rows: model and way; columns: m."""
    ms = sorted({row["m"] for row in rows if row["m"]})
    found = {(row["model"], row["way"], row["m"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for way in (w for w in ways if any((model, w, m) in found for m in ms)):
            lines.append([model, WAYS[way], *(shown(found.get((model, way, m))) for m in ms)])
    return markdown(["model", "m-SAM", *(f"m = {m}" for m in ms)], lines)


def sam_itself(rows: list[Row]) -> str:
    """What the ratios refer to, and RW-SAM beside it."""
    found = {(row["model"], row["way"]): row for row in rows if row["m"] is None}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        sam = found[model, "sam"]
        size = f"{sam['parameters'] / 1e6:.2f} M, batch {sam['batch_size']}"
        rw = [ratio(found.get((model, way))) for way in PROBES]
        lines.append([model, size, f"{sam['ms']:.1f} ms", f"{sam['peak'] / 2**20:.0f} MiB", *rw])
    return markdown(["model", "size", "SAM's step", "SAM's memory", *(f"RW-SAM, {p}" for p in PROBES.values())], lines)


def where(data: dict[str, Any]) -> str:
    """The machine and what matters of the settings."""
    m, s = data["machine"], data["settings"]
    threads = f"{m['threads']} of {m['cores']} cores, " if m["device"] == "cpu" else ""
    name = f"CPU, {m['cpu']}" if m["device"] == "cpu" else m["device"]
    kept = m.get("allocator") if m["device"] == "cpu" else None
    said = [f"torch {m['torch']}", m["date"], *filter(None, [s.get("dtype"), s.get("note"), kept])]
    return f"{name}, {threads}{', '.join(said)}"


def m_sam(data: dict[str, Any]) -> str:
    """Time, memory and counted work of m-SAM and RW-SAM."""
    rows = data["rows"]
    return (
        f"{where(data)}. Step time as a ratio to SAM's, median (range) over {data['settings']['rounds']} interleaved "
        f"rounds at most:\n\n{by_m(rows, list(WAYS), ratio)}\n"
        f"Peak memory beyond the parameters, as a ratio to SAM's:\n\n{by_m(rows, list(WAYS), memory)}\n"
        f"Counted operations, as a ratio to SAM's:\n\n{by_m(rows, ['parallel'], work)}\n"
        f"SAM itself, and RW-SAM's step time as a ratio to it:\n\n{sam_itself(rows)}\n"
    )


def step_cost(data: dict[str, Any]) -> str:
    """What a method's own algebra costs, beside the other implementation."""
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
        f"{where(data)}. A step without its passes and the base step, median (range) of {data['settings']['rounds']} "
        "rounds; peak memory in copies of the parameters, the gradient being one; passes a step:\n\n"
        f"{markdown(head, lines)}\n{UNLIKE.format(norms=norms)}\n"
    )


def cost_rule(data: dict[str, Any]) -> str:
    """How well the rule that holds gradients or keeps factors chooses."""
    rows = data["rows"]
    sizes = sorted({row["rows"] for row in rows})
    found = {(row["height"], row["width"], row["rows"]): row for row in rows}
    lines = []
    for height, width in dict.fromkeys((row["height"], row["width"]) for row in rows):
        cells = [found[height, width, r] for r in sizes]
        shown = [f"{row['factored'] / row['held']:.2f}, {row['chosen']}" for row in cells]
        lines.append([f"{height} x {width}", "factored / held, chosen", *shown])
    right, worst = sum(row["regret"] <= 0 for row in rows), max(row["regret"] for row in rows)
    return (
        f"{where(data)}. A linear layer's share of a step: time with gradients as factors over time with them held "
        f"whole, for {data['settings']['total']} rows in micro-batches of r, and what the rule chooses: the faster way "
        f"in {right} of {len(rows)}, and at worst one that takes {100 * worst:.0f} % longer.\n\n"
        f"{markdown(['matrix', '', *(f'r = {r}' for r in sizes)], lines)}\n"
    )


def floor(data: dict[str, Any]) -> str:
    """Where the time of a step goes, and where what it takes beyond SAM's comes from."""
    rows = data["rows"]
    sam = {row["model"]: row for row in rows if row["way"] == "sam"}
    parts = ["products (floor)", "other kernels (floor)", "Python, dispatch", "page faults"]
    terms = ["operations", "their speed", "bytes", "their speed", "Python, dispatch", "page faults"]
    times = markdown(["model", "step", "ms (range)", "floor", *parts], map(spent, rows))
    beyond = [shares(row, sam[row["model"]]) for row in rows if row["way"] != "sam"]
    return (
        f"{where(data)}. {attained(data['settings']['rates'].values())} Milliseconds of a step, median (range) of "
        f"{data['settings']['rounds']} rounds at most; the floor is what its kernels would take at these rates. Page "
        f"faults are part of the kernels' time:\n\n{times}\n"
        "The same step times as ratios to SAM's. They are the sum of 1 and of: operations counted beyond SAM's, at "
        "SAM's speed; products slower than SAM's; bytes that other kernels move beyond SAM's, at SAM's speed; other "
        "kernels slower than SAM's; everything else. Page faults are part of the second and the fourth:\n\n"
        f"{markdown(['model', 'step', 'time', *terms], beyond)}\n"
    )


def called(row: Row) -> str:
    """A way to step, in the tables of where its time goes."""
    return {"sam": "SAM", "rw_exact": "RW-SAM, exact norms"}.get(row["way"], f"m-SAM, m = {row['m']}")


def spent(row: Row) -> list[str]:
    """A step's milliseconds, and their parts."""
    ms = f"{row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    kernels = [f"{row[f'{kind}_ms']:.2f} ({row[f'{kind}_floor_ms']:.2f})" for kind in ("product", "other")]
    whole = row["product_floor_ms"] + row["other_floor_ms"]
    return [row["model"], called(row), ms, f"{whole:.2f}", *kernels, f"{beside(row):.2f}", f"{row['fault_ms']:.2f}"]


def shares(row: Row, sam: Row) -> list[str]:
    """A step's time as a ratio to SAM's, and what the difference is made of."""
    terms = [f"{round(term, 2) + 0:+.2f}" for term in extra(row, sam)]  # + 0: no minus zero
    return [row["model"], called(row), f"{row['ms'] / sam['ms']:.2f}", *terms]


def beside(row: Row) -> float:
    """Milliseconds in no kernel: Python, autograd, dispatch, allocation."""
    return row["ms"] - row["product_ms"] - row["other_ms"]


def extra(row: Row, sam: Row) -> list[float]:
    """Parts of SAM's step that a step takes beyond it: five terms that add up; and those of page faults, among them."""
    products = sam["product_ms"] * row["flops"] / sam["flops"]
    others = sam["other_ms"] * row["other_bytes"] / sam["other_bytes"]
    terms = [products - sam["product_ms"], row["product_ms"] - products]
    terms += [others - sam["other_ms"], row["other_ms"] - others]
    terms += [beside(row) - beside(sam), row["fault_ms"] - sam["fault_ms"]]
    return [term / sam["ms"] for term in terms]


def attained(rates: Iterable[dict[str, Any]]) -> str:
    """The rates that the floors were made with, as they were over the models."""
    rates = list(rates)
    said = lambda values: f"{min(values):.0f} to {max(values):.0f}"  # noqa: E731
    product, convolution = (said([r["gflops"][kind] for r in rates]) for kind in ("matrix", "convolution"))
    cached, copied = (said([list(r["gigabytes"].values())[at] for r in rates]) for at in (0, -1))
    return (
        f"Attained over the run: products {product} and convolutions {convolution} GFlop/s, copies {cached} GB/s in "
        f"the caches and {copied} out of them; a page fault takes {said([1e3 * r['fault_us'] for r in rates])} ns."
    )


def tables(records: Path = RECORDS) -> str:
    """Every record's tables."""
    writers = {"m_sam": m_sam, "floor": floor, "step_cost": step_cost, "cost_rule": cost_rule}
    found = [record.read(path) for path in sorted(records.glob("*.json"))]
    found = [data for data in found if data["benchmark"] in writers]
    found.sort(key=lambda data: list(writers).index(data["benchmark"]))
    return "\n".join(writers[data["benchmark"]](data).rstrip("\n") + "\n" for data in found)


def summary(records: Path = RECORDS) -> str:
    """The median ratios of m-SAM alone, one after the other and in two passes."""
    data = record.read(records / "m_sam_cpu.json")
    return f"{by_m(data['rows'], ['serial', 'parallel'], short)}\n{where(data)}.\n"


def short(row: Row | None) -> str:
    """``0.92``: the median alone."""
    return ratio(row).split(" ")[0]


def with_table(text: str, records: Path = RECORDS) -> str:
    """The text with all tables, or the summary, between the marks that it has."""
    for begin, end, made in ((BEGIN, END, tables), (SUMMARY_BEGIN, SUMMARY_END, summary)):
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + made(records) + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(with_table(path.read_text()))
