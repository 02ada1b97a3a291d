"""Check the drifts of the m-sharpness theory on a real net, and the order of tr V at the end of training.

``python examples/drift_of_m_sharpness.py`` measures on the digits, over seeds, and writes
``docs/records/sde_digits.json``. Every finished seed is kept; the same command continues after an interruption.

- drift: a tanh net 64-32-10 on 512 digits in float64, trained by SGD for some epochs. The updates of m-USAM and m-SAM
  less SGD's, averaged over random batches of 64, are compared with the gradient of the regulariser that the theory adds
  to SGD's drift, for falling m: cosine and relative error; and ``E norm(grad f_I)``.
- trace: tr V over the training set at the end of training by method, under the protocol of ``steppe compare`` without
  label noise (with label noise: ``docs/records/m_sharpness.json``).

``--print`` shows the tables of the record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.progress import track
from torch import nn

import steppe
from steppe.factored import gradient_statistics
from steppe.lab import runs, spec, tasks, train
from steppe.lab.metrics import evaluate
from steppe.lab.record import environment
from steppe.lab.settings import Settings
from steppe.sde import problem_of, regularisers

RECORD = Path(__file__).parents[1] / "docs" / "records" / "sde_digits.json"
N, SIZE, MS, REPEATS = 512, 64, (64, 16, 4, 1), 8
EPOCHS, RHOS = (2, 30), (0.01, 0.05)
RULES = {"USAM": steppe.USAM, "SAM": steppe.SAM}
METHODS = ("SGD", "SAM(rho=0.2)", "SAM(rho=0.2, m=8)", "RWSAM(rho=0.2)")
CRITERION = nn.CrossEntropyLoss(reduction="none")


def drift(seed: int) -> list[dict[str, Any]]:
    """Return measured and predicted drift of one seed's net."""
    task = tasks.load(Settings(train_size=N, noise=0.0), seed)
    inputs, labels = task.inputs.double(), task.labels
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    whole = steppe.Batch.supervised(model, CRITERION, inputs, labels)
    base, rows, trained = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), [], 0
    for epochs in EPOCHS:
        for epoch in range(trained, epochs):
            for index in batches(seed, epoch):
                whole.subset(index)()
                base.step()
        trained = epochs
        for rho in RHOS:
            for m in MS:
                terms = regularisers(*problem_of(whole), rho, m, generator=torch.Generator().manual_seed(10**6 + seed))
                added = {"USAM": (terms.gradient + terms.variance).gradient, "SAM": terms.norm.gradient}
                for name, predicted in added.items():
                    real = added_by(RULES[name], whole, rho, m, seed)
                    rows.append(
                        {
                            "seed": seed,
                            "epochs": epochs,
                            "rule": name,
                            "rho": rho,
                            "m": m,
                            "cosine": float(torch.cosine_similarity(real, predicted, 0)),
                            "relative_error": float((real - predicted).norm() / predicted.norm()),
                            "share": float(predicted.norm() / terms.loss.gradient.norm()),
                            "mean_norm": float(terms.norm.value) / rho,
                        }
                    )
    return rows


def added_by(method: Any, whole: steppe.Batch, rho: float, m: int, seed: int) -> torch.Tensor:
    """Return the mean over batches of the update less SGD's on the same batches, in units of the learning rate."""
    parameters = list(whole.model.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = method(torch.optim.SGD(parameters, lr=1.0), rho, m=m)
    total, count = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64), 0
    for repeat in range(REPEATS):
        for index in batches(seed, 1000 + repeat):
            batch = whole.subset(index)
            batch()
            total -= torch.cat([p.grad.flatten() for p in parameters])
            optimizer.step(batch)
            with torch.no_grad():
                for p, w in zip(parameters, before, strict=True):
                    p.grad = w - p  # the update
                    p.copy_(w)
            total += torch.cat([p.grad.flatten() for p in parameters])
            count += 1
    return total / count


def batches(seed: int, epoch: int) -> tuple[torch.Tensor, ...]:
    """Return the indices of one epoch's batches of 64; every example occurs once."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(10_000 * seed + epoch)).split(SIZE)


def traces(seed: int) -> list[dict[str, Any]]:
    """Return tr V at the end of training by every method under one seed."""
    settings, rows = Settings(noise=0.0), []
    for text in METHODS:
        run = runs.Run(spec.parse(text), seed, settings)
        task = tasks.load(settings, seed)
        model = train.initial_model(run, task)
        whole = steppe.Batch.supervised(model, CRITERION, task.inputs, task.labels)
        optimizer = spec.build(run.method, model, settings, full=whole)
        steps = settings.epochs * settings.steps_per_epoch
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for order in train.orders(run, task):
            for index in order:
                optimizer.step(whole.subset(index))
                schedule.step()
        noise = gradient_statistics(whole)
        _, error = evaluate(model, task.test_inputs, task.test_labels)
        loss, _ = evaluate(model, task.inputs, task.labels)
        found = {"trace_V": float(noise.trace), "g_norm": float(noise.g_norm), "train_loss": loss, "test_error": error}
        rows.append({"seed": seed, "method": text, **found})
    return rows


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean and standard deviation as text."""
    return f"{mean(values):.{digits}g} ± {stdev(values):.1g}" if len(values) > 1 else f"{values[0]:.{digits}g}"


def tables(record: dict[str, Any]) -> str:
    """Return both parts as Markdown: mean ± standard deviation over seeds."""
    lines = ["| rule | epochs | rho | m | cosine | relative error | share of grad f | E norm(grad f_I) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    rows = [row for part in record["drift"].values() for row in part]
    for rule, epochs, rho, m in dict.fromkeys((r["rule"], r["epochs"], r["rho"], r["m"]) for r in rows):
        same = [r for r in rows if (r["rule"], r["epochs"], r["rho"], r["m"]) == (rule, epochs, rho, m)]
        keys = ("cosine", "relative_error", "share", "mean_norm")
        cells = [spread([r[key] for r in same]) for key in keys]
        lines.append(f"| {rule} | {epochs} | {rho} | {m} | " + " | ".join(cells) + " |")
    lines += ["", "| method | n | tr V | norm(grad f) | training loss | test error % |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        same = [r for part in record["trace"].values() for r in part if r["method"] == method]
        if same:
            cells = [spread([r[key] for r in same]) for key in ("trace_V", "g_norm", "train_loss")]
            cells.append(spread([100 * r["test_error"] for r in same]))
            lines.append(f"| {method} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what the record does not hold yet, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--print", action="store_true", help="show the record and measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = (
        json.loads(RECORD.read_text()) if RECORD.exists() else {"environment": environment(), "drift": {}, "trace": {}}
    )
    jobs = [
        (part, seed) for part in ("drift", "trace") for seed in range(options.seeds) if str(seed) not in record[part]
    ]
    try:
        for part, seed in track(jobs if not options.print else [], "measuring"):
            rows = {"drift": drift, "trace": traces}[part](seed)
            rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
            record[part][str(seed)] = rounded
            RECORD.write_text(json.dumps(record, indent=1) + "\n")
    except KeyboardInterrupt:
        print("Stopped; finished seeds are kept, the same command continues.")
    print(tables(record))


if __name__ == "__main__":
    main()
