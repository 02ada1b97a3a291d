"""Measure how well RW-SAM's probe ranks examples by their gradient norm, early and late in training.

``python -m benchmarks.probe_quality --out benchmarks/records/probe_quality.json`` trains the digits MLP by SGD under
40 % label noise (the lab's task) and, at some epochs, compares the finite difference with exact norms: Spearman's rank
correlation, median over batches. Exact norms come from the factors, and from ``torch.func.vmap`` as a check.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import steppe
from steppe.engine.parameters import Parameters, Radii
from steppe.factored import gradient_statistics
from steppe.lab import spec, tasks, train
from steppe.lab.record import environment
from steppe.lab.settings import Settings

RHO = 0.5
PROBES = {(length, probes): steppe.FiniteDifference(length, probes) for length in (0.01, 0.1, 1.0) for probes in (1, 4)}
EPOCHS = (1, 10, 40, 150)


def by_vmap(batch: steppe.Batch) -> Tensor:
    """Return ``norm(grad f_i)`` from per-example gradients."""
    parameters = {name: p.detach() for name, p in batch.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(batch.model, parameters, (x[None],)), y[None])

    rows = vmap(grad(loss), (None, 0, 0))(parameters, *batch.data)
    return torch.cat([row.flatten(1) for row in rows.values()], 1).norm(dim=1)


def correlations(batches: list[steppe.Batch]) -> list[dict[str, float]]:
    """Return a row for each probe: the median over batches of its rank correlation with the exact norms."""
    found: dict[tuple[float, int], list[float]] = {key: [] for key in PROBES}
    for step, batch in enumerate(batches):
        exact = gradient_statistics(batch).norms
        torch.testing.assert_close(exact, by_vmap(batch), rtol=1e-3, atol=1e-5)
        parameters = list(batch.model.parameters())
        for key, probe in PROBES.items():
            f = steppe.Oracle(batch, Parameters(parameters, Radii([RHO] * len(parameters))), step=step)
            found[key].append(float(spearmanr(probe(f), exact).statistic))
    return [{"length": length, "probes": k, "rank_correlation": median(v)} for (length, k), v in found.items()]


def measure(seed: int = 0) -> list[dict[str, float]]:
    """Train, and compare at some epochs."""
    settings = Settings()
    one = train.Run(spec.parse("SGD"), seed, settings)
    task = tasks.load(settings, seed)
    model = train.initial_model(one, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    criterion = nn.CrossEntropyLoss(reduction="none")
    rows: list[dict[str, float]] = []
    for epoch, order in enumerate(train.orders(one, task), start=1):
        batches = [steppe.Batch.supervised(model, criterion, task.inputs[r], task.labels[r]) for r in order]
        for batch in batches:
            optimizer.step(batch)  # type: ignore[arg-type]
        if epoch in EPOCHS:
            rows += [{"epoch": epoch, **row} for row in correlations(batches)]
    return rows


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    for row in rows:
        print(row)
    if options.out:
        options.out.write_text(
            json.dumps({"benchmark": "probe_quality", "rho": RHO, "environment": environment(), "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
