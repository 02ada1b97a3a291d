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
RHO = 0.2
LAMBDAS = (0.25, 1.0, 4.0)
METHODS = {
    "SGD": lambda base: base,
    **{f"m = {m}": lambda base, m=m: steppe.SAM(base, RHO, m=m) for m in (128, 64, 32, 16, 8, 4, 2, 1)},
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


def sweep(seeds: int, epochs: int, workers: int) -> dict[str, Any]:
    """All methods over all seeds."""
    jobs = list(product(METHODS, range(seeds)))
    with ProcessPoolExecutor(workers) as pool:
        rows = list(pool.map(run, *zip(*((name, seed, epochs) for name, seed in jobs), strict=True)))
    return {"rho": RHO, "epochs": epochs, "seeds": seeds, "environment": environment(), "rows": rows}


def table(record: dict[str, Any]) -> str:
    """Mean and standard deviation of every method, as Markdown."""
    lines = ["| method | n | test error % | training loss | tr V | ms a step |", "|---|---|---|---|---|---|"]
    for name in METHODS:
        rows = [row for row in record["rows"] if row["method"] == name]

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
    names = [name for name in METHODS if name.startswith("m = ")]
    for axis, key, label in zip(axes, ("error", "trace_V"), ("test error", "tr V at the end"), strict=True):
        for name in names:
            values = [row[key] for row in record["rows"] if row["method"] == name]
            m = int(name.split("= ")[1])
            axis.plot([m] * len(values), values, "o", color="C0", alpha=0.35, markersize=4)
        means = [mean(row[key] for row in record["rows"] if row["method"] == name) for name in names]
        axis.plot([int(name.split("= ")[1]) for name in names], means, "-", color="C0", label=f"m-SAM, rho {RHO}")
        for kind, style in (("exact", "--"), ("probe", ":")):
            for i, lam in enumerate(LAMBDAS):
                rows = [row[key] for row in record["rows"] if row["method"] == f"RW {kind}, lam = {lam}"]
                axis.axhline(mean(rows), linestyle=style, color=f"C{i + 1}", label=f"RW-SAM {kind}, lam {lam}")
        axis.set(xscale="log", xlabel="m, examples that share a perturbation", ylabel=label)
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], [1, 2, 4, 8, 16, 32, 64, 128])
        if key == "trace_V":
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Run, or draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--figure", type=Path, help="draw the record instead of training")
    options = parser.parse_args()
    if options.figure:
        figure(json.loads(RECORD.read_text()), options.figure)
        return
    record = sweep(options.seeds, options.epochs, options.workers)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
