"""Does m-SAM's trend hold down to m = 1? Error against m on the digits with label noise, RW-SAM beside it.

``python recipes/m_sharpness.py`` trains every method over the seeds (paired: same split, noise, weights and order)
and writes ``recipes/records/m_sharpness.json``; ``--figure FILE.svg`` draws it (needs matplotlib). The protocol
is `steppe compare`'s: 1,000 digits, 40 % symmetric label noise, MLP 64-256-256-10, batch 128, SGD momentum 0.9, weight
decay 5e-4, cosine from 0.05, 150 epochs, error at the last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import steppe
from steppe.factored import gradient_statistics
from steppe.lab import spec, tasks, train
from steppe.lab.environment import environment
from steppe.lab.settings import Settings

RECORD = Path(__file__).parent / "records" / "m_sharpness.json"
RHO, SMALL = 0.2, 0.05
MS = (128, 64, 32, 16, 8, 4, 2, 1)
LAMBDAS = (0.25, 1.0, 4.0)
METHODS = {
    "SGD": lambda base: base,
    **{f"m = {m}": lambda base, m=m: steppe.SAM(base, RHO, m=m) for m in MS},
    **{f"rho {SMALL}, m = {m}": lambda base, m=m: steppe.SAM(base, SMALL, m=m) for m in MS},
    **{f"RW exact, lam = {lam}": lambda base, lam=lam: steppe.RWSAM(base, RHO, lam) for lam in LAMBDAS},
    **{f"RW probe, lam = {lam}": lambda base, lam=lam: steppe.RWSAM(base, RHO, lam, parallel=False) for lam in LAMBDAS},
}


def run(name: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train one method under one seed, and measure where it ended."""
    torch.set_num_threads(1)
    settings = Settings(epochs=epochs)
    one = train.Run(spec.parse("SGD"), seed, settings)
    task = tasks.load(settings, seed)
    model = train.initial_model(one, task)
    base = torch.optim.SGD(
        model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    optimizer = METHODS[name](base)
    steps = epochs * settings.steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    criterion = nn.CrossEntropyLoss(reduction="none")
    started = time.perf_counter()
    for order in train.orders(one, task):
        for rows in order:
            optimizer.step(steppe.Batch.supervised(model, criterion, task.inputs[rows], task.labels[rows]))
            schedule.step()
    seconds = time.perf_counter() - started
    noise = gradient_statistics(steppe.Batch.supervised(model, criterion, task.inputs, task.labels))
    train_loss, _ = train.evaluate(model, task.inputs, task.labels)
    _, error = train.evaluate(model, task.test_inputs, task.test_labels)
    return {
        "method": name,
        "seed": seed,
        "error": error,
        "train_loss": train_loss,
        "trace_V": float(noise.trace),
        "ms_per_step": 1e3 * seconds / steps,
    }


def sweep(methods: list[str], seeds: int, epochs: int, workers: int) -> dict[str, Any]:
    """These methods over all seeds."""
    jobs = list(product(methods, range(seeds)))
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(run, *zip(*((name, seed, epochs) for name, seed in jobs), strict=True)))
    return {"epochs": epochs, "seeds": seeds, "environment": environment(), "rows": rows}


def table(record: dict[str, Any]) -> str:
    """Mean and standard deviation of every method, as Markdown."""
    lines = ["| method | n | test error % | training loss | tr V | ms a step |", "|---|---|---|---|---|---|"]
    for name in METHODS:
        rows = [row for row in record["rows"] if row["method"] == name]
        if not rows:
            continue

        def spread(key: str, scale: float = 1.0, rows: list[dict[str, Any]] = rows) -> str:
            values = [scale * row[key] for row in rows]
            return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

        cells = [spread("error", 100), spread("train_loss"), spread("trace_V"), spread("ms_per_step")]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(record: dict[str, Any], path: Path) -> None:
    """Error and tr V against m, each seed a point; RW-SAM as lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("error", "trace_V"), ("test error", "tr V at the end"), strict=True):
        for prefix, rho, color in (("", RHO, "C0"), (f"rho {SMALL}, ", SMALL, "C4")):
            values = {m: [r[key] for r in record["rows"] if r["method"] == f"{prefix}m = {m}"] for m in MS}
            for m in MS:
                axis.plot([m] * len(values[m]), values[m], "o", color=color, alpha=0.35, markersize=4)
            axis.plot(MS, [mean(values[m]) for m in MS], "-", color=color, label=f"m-SAM, rho {rho}")
        for kind, style in (("exact", "--"), ("probe", ":")):
            for i, lam in enumerate(LAMBDAS):
                rows = [row[key] for row in record["rows"] if row["method"] == f"RW {kind}, lam = {lam}"]
                axis.axhline(mean(rows), linestyle=style, color=f"C{i + 1}", label=f"RW-SAM {kind}, lam {lam}")
        axis.set(xscale="log", xlabel="m, examples that share a perturbation", ylabel=label)
        axis.set_xticks(MS, MS)
        if key == "trace_V":
            axis.set_yscale("log")
    axes[0].set_ylim(0, 0.4)
    axes[0].text(1, 0.385, f"rho {RHO}, m = 1 and 2: collapsed, error 0.9", fontsize=8)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path)


def main() -> None:
    """Run, or draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--only", default="", help="train the methods whose names begin so; the record keeps the others"
    )
    parser.add_argument("--figure", type=Path, help="draw the record instead of training")
    options = parser.parse_args()
    if options.figure:
        figure(json.loads(RECORD.read_text()), options.figure)
        return
    chosen = [name for name in METHODS if name.startswith(options.only)]
    record = sweep(chosen, options.seeds, options.epochs, options.workers)
    if options.only and RECORD.exists():
        before = json.loads(RECORD.read_text())["rows"]
        record["rows"] = [row for row in before if row["method"] not in chosen] + record["rows"]
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
