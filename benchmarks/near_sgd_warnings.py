"""When the two warnings of a run that goes wrong come: at the loss of a guess, and of a correction longer than ``g``.

``python -m benchmarks.near_sgd_warnings RESULTS.jsonl`` trains what the file lacks, a line a run, and can be stopped at
any time; ``--record`` writes docs/records/warnings.json from it. MNIST-1D needs the package ``mnist1d``, Fashion-MNIST
Debian's ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from benchmarks import near_sgd_resnet
from benchmarks.near_sgd_variants import Data, batches, digits, mnist_1d, perceptron, split
from steppe.lab.models import cnn

RECORD = Path(__file__).parents[1] / "docs" / "records" / "warnings.json"
STEPS, BATCH, CLASSES = 2000, 128, 10
SIGNS = {"guess": "knows nothing", "outgrown": "times as long as the batch's gradient"}  # in the warnings' texts


def clothes() -> Data:
    """Return 8,000 images of Fashion-MNIST at 14 x 14."""
    x, y, test_x, test_y = near_sgd_resnet.data()
    return torch.cat([x[:5000], test_x]), torch.cat([y[:5000], test_y])


@dataclass(frozen=True)
class Task:
    """Data, how many of them are trained on, a tuned and a large learning rate, and a model."""

    data: Callable[[], Data]
    size: int
    lrs: tuple[float, float]
    model: Callable[[Tensor, int], nn.Module]  # of an example and the number of classes


TASKS = {
    "digits": Task(digits, 600, (0.05, 0.2), perceptron(256, 256)),
    "MNIST-1D": Task(mnist_1d, 3000, (0.1, 0.4), perceptron(128, 128, 128)),
    "Fashion-MNIST": Task(clothes, 2000, (0.05, 0.4), lambda example, classes: cnn(1, 8, classes)),
}


def sampled(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
    """Return the base optimizer, and options of SAM for pairs of ``m`` and ``rho``."""
    return [{}, *({"rho": rho, "m": m, "sampled": 1} for m, rho in pairs)]


WHOLE: list[dict[str, Any]] = [{"rho": 1.0}, {"rho": 0.4, "ascent": 16}]
TUNED = sampled((16, 0.05), (16, 0.1), (16, 0.2), (16, 0.5), (4, 0.2), (1, 0.05), (1, 0.2)) + WHOLE
LARGE = sampled((16, 0.05), (16, 0.1), (16, 0.2), (4, 0.2), (1, 0.05))
STEADY = sampled((16, 0.1), (16, 0.2), (4, 0.2), (1, 0.05))


def runs() -> Iterator[dict[str, Any]]:
    """Yield what is trained: task, label noise, learning rate, its schedule, and the options of SAM."""
    for name, task in TASKS.items():
        for noise in (0.0, 0.4):
            about = {"task": name, "noise": noise}
            for lr, schedule, some in ((0, "cosine", TUNED), (1, "cosine", LARGE), (0, "constant", STEADY)):
                for options in some:
                    yield about | {"lr": task.lrs[lr], "schedule": schedule, "options": options}


def train(about: dict[str, Any], data: Data, seed: int = 0) -> dict[str, Any]:
    """Return the test error in per cent, and the step at which each warning came."""
    task, (inputs, labels) = TASKS[about["task"]], data
    x, y, rest = split(data, task.size, about["noise"], seed)
    torch.manual_seed(seed)
    model = task.model(x[0], CLASSES)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=about["lr"], momentum=0.9, weight_decay=5e-4)
    if about["options"]:
        optimizer = steppe.SAM(optimizer, **about["options"])
    cosine = lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine if about["schedule"] == "cosine" else lambda t: 1.0)
    fired: dict[str, int | None] = dict.fromkeys(SIGNS)
    ratio, losses = 0.0, []
    for step, on in zip(range(STEPS), batches(task.size, BATCH, seed), strict=False):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x[on], y[on])
            losses.append(float(optimizer.step(batch)))
        schedule.step()
        for name, sign in SIGNS.items():
            if any(sign in str(warning.message) for warning in seen):
                fired[name] = step + 1
        ratio = max(ratio, float(getattr(optimizer, "telemetry", steppe.Telemetry()).correction_mean or 0.0))
    with torch.no_grad():
        error = 100 * (model(inputs[rest]).argmax(1) != labels[rest]).float().mean().item()
    last = sum(losses[-20:]) / 20
    return {"error": round(error, 1), **fired, "last": round(last, 3), "max_ratio": round(ratio, 2)}


def record(found: list[dict[str, Any]]) -> None:
    """Write the record, a line a run."""
    what = (
        f"SAM around SGD with momentum 0.9 (no options: SGD alone), batch {BATCH}, {STEPS} steps, seed 0, by "
        "benchmarks/near_sgd_warnings.py; error: test error in per cent; guess and outgrown: the step of the warning; "
        "last: mean training loss of the last 20 steps; max_ratio: the largest telemetry.correction_mean"
    )
    lines = ",\n  ".join(json.dumps(run) for run in found)
    RECORD.write_text(f'{{\n "what": {json.dumps(what)},\n "runs": [\n  {lines}\n ]\n}}\n')


def main() -> None:
    """Train what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--record", action="store_true", help="write the record of what the file has")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    if args.record:
        record(found)
        return
    data: dict[str, Data] = {}
    for about in runs():
        if not any(about.items() <= run.items() for run in found):
            if about["task"] not in data:
                data[about["task"]] = TASKS[about["task"]].data()
            run = about | train(about, data[about["task"]])
            with args.results.open("a") as file:
                file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main()
