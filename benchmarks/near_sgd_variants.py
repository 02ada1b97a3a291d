"""Variants of sampled m-SAM on small tasks at tuned learning rates: draws, clipping, layers, controls, schedules.

``python -m benchmarks.near_sgd_variants RESULTS.jsonl --fortunes FOLDER`` trains what the file lacks, a line a run, and
can be stopped at any time. ``tools/near_sgd.py`` makes the record and the table of docs/near-sgd.md from the file.
MNIST-1D needs the package ``mnist1d``; the texts are Debian's ``fortunes``, told apart by the file that they are from.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import steppe
from steppe import CoupledWSAM, Declaration, LookSAM, MomentumSAM, Oracle, Rule, SharpnessAware, Update
from steppe.engine.sampling import batch_of, drawn
from steppe.engine.vector import TINY, Vector
from steppe.lab.models import mlp
from steppe.lab.tasks import noisy, stream
from steppe.schedule import Periodic, ProportionalToLR, Tail, Window

M, BATCH = 16, 128
Data = tuple[Tensor, Tensor]


# ---- the variants: functions from the oracle to the update


def parts(f: Oracle, m: int, k: int) -> list[Oracle]:
    """Return the oracles of ``k`` random micro-batches."""
    return [f.part(batch_of(draw)) for draw in drawn(f.batch(), m, k, 0, f.step)]


def of_indices(f: Oracle, on: Tensor) -> Oracle:
    """Return the oracle of these examples."""
    return f.part(f.batch().subset(on))


def difference(part: Oracle) -> Vector:
    """Return ``h - d`` of a part."""
    return part.update(Rule()).grad - part.g


def corrected(f: Oracle, chosen: list[Oracle], change: Callable[[Vector], Vector] = lambda v: v) -> Update:
    """Return ``g`` and the changed mean of the parts' corrections; count what they cost."""
    total = Vector([None] * len(f.w.tensors))
    for part in chosen:
        total = total + (1 / len(chosen)) * difference(part)
        count(f, part)
    return Update(f.g + change(total))


def count(f: Oracle, part: Oracle) -> None:
    """Count the passes of a part."""
    f.passes.log.add_sample(0.0, len(part.batch()) / len(f.batch()), part.passes.log)


def control(f: Oracle) -> Update:
    """``eps`` from one micro-batch, the difference on another: what m-SAM does is lost."""
    f.g = f.g
    ascent, other = parts(f, M, 2)
    eps = f.rho * (1 / (ascent.g.norm() + TINY) * ascent.g)
    d = other.g
    with other.at(eps):
        h = other.grad()
    count(f, other)
    return Update(f.g + (h - d))


def sampled_sam(f: Oracle) -> Update:
    """``eps`` from the whole batch, the difference on a micro-batch: SAM in expectation."""
    part = parts(f, M, 1)[0]
    eps, d = f.rho * (1 / (f.g.norm() + TINY) * f.g), part.g
    with part.at(eps):
        h = part.grad()
    count(f, part)
    return Update(f.g + (h - d))


def stratified(f: Oracle) -> Update:
    """Draw one example of each of ``M`` groups of equal loss."""
    f.g = f.g
    groups = f.losses_at_w().argsort().tensor_split(M)
    random = torch.Generator().manual_seed(f.step)
    on = torch.stack([group[torch.randint(len(group), (), generator=random)] for group in groups])
    return corrected(f, [of_indices(f, on)])


def mirrored(f: Oracle) -> Update:
    """Two draws of ``M / 2``; where one has a large loss the other has a small one."""
    f.g = f.g
    order = f.losses_at_w().argsort()
    ranks = torch.randperm(len(order) // 2, generator=torch.Generator().manual_seed(f.step))[: M // 2]
    flip = torch.rand(M // 2, generator=torch.Generator().manual_seed(f.step)) < 0.5
    low, high = order[ranks], order[len(order) - 1 - ranks]
    return corrected(f, [of_indices(f, torch.where(flip, a, b)) for a, b in ((low, high), (high, low))])


def half_the_tensors(f: Oracle) -> Update:
    """Twice the correction, on a random half of the tensors."""
    f.g = f.g
    n = len(f.w.tensors)
    kept = set(torch.randperm(n, generator=torch.Generator().manual_seed(f.step))[: n // 2].tolist())
    return corrected(f, parts(f, M, 1), lambda v: 2.0 * v.where(i in kept for i in range(n)))


def layers(first: bool) -> Callable[[Oracle], Update]:
    """Correct the first layer alone, or the others alone."""

    def rule(f: Oracle) -> Update:
        f.g = f.g
        return corrected(f, parts(f, M, 1), lambda v: v.where((i < 2) == first for i in range(len(v.tensors))))

    return rule


def clipped_by_tensor(f: Oracle) -> Update:
    """Limit the correction of each tensor to half of that tensor's gradient."""
    f.g = f.g
    limit = lambda t, g: t * (0.5 * g.norm() / (t.norm() + TINY)).clamp(max=1)  # noqa: E731
    return corrected(f, parts(f, M, 1), lambda v: v.map(limit, f.g))


@dataclass(frozen=True)
class ClippedByMean:
    """Limit the norm of the correction to its running mean."""

    declares: ClassVar[steppe.Declaration] = Declaration(numbers=frozenset({"size"}))

    def __call__(self, f: Oracle) -> Update:
        """Return the update."""
        f.g = f.g

        def change(v: Vector) -> Vector:
            now = float(v.norm())
            mean = f.recall_number("size", default=now)
            f.remember_number("size", 0.98 * mean + 0.02 * min(now, 3 * mean))
            return min(1.0, mean / (now + TINY)) * v

        return corrected(f, parts(f, M, 1), change)


@dataclass(frozen=True)
class WithRate:
    """A micro-batch that shrinks with the learning rate, from 32 examples at its start."""

    lr: float

    def __call__(self, f: Oracle) -> Update:
        """Return the update."""
        f.g = f.g
        return corrected(f, parts(f, max(1, round(2 * M * f.group["lr"] / self.lr)), 1))


@dataclass(frozen=True)
class Variant:
    """What is tried: an optimizer made of (base, radius, learning rate, steps), over three radii."""

    make: Callable[[torch.optim.Optimizer, Any, float, int], torch.optim.Optimizer]
    radii: tuple[float, ...] = (0.05, 0.1, 0.2)
    batch: int = BATCH
    rates: tuple[float, ...] = (1.0,)  # factors of the task's learning rate


WHOLE = (0.1, 0.2, 0.4)  # radii of a perturbation that many examples share


def sam(radii: tuple[float, ...] = (0.05, 0.1, 0.2), **options: Any) -> Variant:
    """Return SAM with these options."""
    return Variant(lambda base, rho, lr, steps: steppe.SAM(base, rho, **options), radii)


def rule(of: Callable[[float], Any], radii: tuple[float, ...] = (0.05, 0.1, 0.2)) -> Variant:
    """Return a rule made of the learning rate."""
    return Variant(lambda base, rho, lr, steps: SharpnessAware(base, of(lr), rho), radii)


def scheduled(of: Callable[[float, float, int], Any], **options: Any) -> Variant:
    """Return SAM with a schedule made of radius, learning rate and steps."""
    return Variant(lambda base, rho, lr, steps: steppe.SAM(base, of(rho, lr, steps), **options))


SAMPLED: dict[str, Any] = {"m": M, "sampled": 1}
VARIANTS = {
    "SGD": Variant(lambda base, rho, lr, steps: base, (0.0,), rates=(0.5, 1.0, 2.0)),
    "SAM": sam(WHOLE),
    "m-SAM, m = 16": sam(m=M),
    "sampled, m = 16": sam(**SAMPLED),
    "ascent, 16": sam(WHOLE, ascent=M),
    "control: difference on another draw": rule(lambda lr: control),
    "sampled, clip 0.5": sam(**SAMPLED, clip=0.5),
    "sampled, 4 draws of 4": sam(m=4, sampled=4),
    "sampled, 2 draws of 8": sam(m=8, sampled=2),
    "sampled, m = 8": sam(m=8, sampled=1),
    "sampled, m = 32": sam(m=32, sampled=1),
    "sampled, 2 draws of 16": sam(m=M, sampled=2),
    "stratified by loss": rule(lambda lr: stratified),
    "two mirrored draws of 8": rule(lambda lr: mirrored),
    "m with the learning rate": rule(WithRate),
    "rho with the learning rate": scheduled(lambda rho, lr, steps: ProportionalToLR(rho, 0.0, lr), **SAMPLED),
    "difference of SAM on a draw": rule(lambda lr: sampled_sam, WHOLE),
    "sampled, clip 0.3": sam(**SAMPLED, clip=0.3),
    "sampled, clip 1": sam(**SAMPLED, clip=1.0),
    "clipped to its running mean": rule(lambda lr: ClippedByMean()),
    "clipped by tensor, 0.5": rule(lambda lr: clipped_by_tensor),
    "a random half of the tensors": rule(lambda lr: half_the_tensors),
    "the first layer alone": rule(lambda lr: layers(True)),
    "all layers but the first": rule(lambda lr: layers(False)),
    "half the correction": Variant(lambda base, rho, lr, steps: CoupledWSAM(base, rho, 1 / 3, **SAMPLED)),
    "sampled after 10 % plain steps": scheduled(lambda rho, lr, steps: Window(rho, steps // 10), **SAMPLED),
    "sampled after 30 % plain steps": scheduled(lambda rho, lr, steps: Window(rho, 3 * steps // 10), **SAMPLED),
    "m-SAM in the last quarter": scheduled(lambda rho, lr, steps: Tail(rho, steps, 0.25), m=M),
    "m-SAM every fourth step": scheduled(lambda rho, lr, steps: Periodic(rho, 4), m=M),
    "LookSAM, k = 4": Variant(lambda base, rho, lr, steps: LookSAM(base, rho, k=4), WHOLE),
    "MomentumSAM": Variant(lambda base, rho, lr, steps: MomentumSAM(base, rho), (0.1, 0.3, 1.0)),
    "SGD, batch 32": Variant(lambda base, rho, lr, steps: base, (0.0,), 32, (0.125, 0.25, 0.5)),
    "SAM, batch 16": Variant(lambda base, rho, lr, steps: steppe.SAM(base, rho), (0.05, 0.1, 0.2), 16, (0.125,)),
}


# ---- the tasks


@dataclass(frozen=True)
class Task:
    """Data, split by the seed, and a model."""

    data: Callable[[], Data]
    size: int  # of the training set
    noise: float
    lr: float  # the best of SGD's on validation data
    epochs: int
    model: Callable[[Tensor, int], nn.Module]  # of an example and the number of classes


def perceptron(*hidden: int) -> Callable[[Tensor, int], nn.Module]:
    """Return the model of a task: these hidden layers."""
    return lambda example, classes: mlp([len(example), *hidden, classes])


def digits() -> Data:
    """scikit-learn's digits."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(y)


def mnist_1d(samples: int = 6000) -> Data:
    """Return MNIST-1D (Greydanus and Kobak 2020, arXiv 2011.14439): signals of 40 values."""
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset  # pip install mnist1d

    args = get_dataset_args()
    args.num_samples = samples
    np.random.seed(args.seed)
    made = make_dataset(args)
    x, y = (torch.cat([torch.tensor(made[key]), torch.tensor(made[f"{key}_test"])]) for key in "xy")
    return x.float(), y.long()


def texts(folder: Path) -> Callable[[], Data]:
    """Return the fortunes of a folder's ten largest files as hashed counts of three letters in a row."""

    def data() -> Data:
        files = sorted((p for p in folder.iterdir() if not p.suffix), key=lambda p: (-p.stat().st_size, p.name))[:10]
        rows, labels = [], []
        for label, path in enumerate(files):
            for text in path.read_text(errors="replace").split("\n%\n")[:400]:
                row = torch.zeros(512)
                for i in range(len(text) - 2):
                    row[zlib.crc32(text[i : i + 3].lower().encode()) % 512] += 1
                rows.append(row / (row.norm() + 1e-6))
                labels.append(label)
        return 8 * torch.stack(rows), torch.tensor(labels)

    return data


def tasks(fortunes: Path) -> dict[str, Task]:
    """Return the tasks by name."""
    return {
        "digits, 40 % noise": Task(digits, 600, 0.4, 0.05, 40, perceptron(256, 256)),
        "MNIST-1D": Task(mnist_1d, 3000, 0.0, 0.4, 30, perceptron(256, 256, 256)),
        "texts": Task(texts(fortunes), 2000, 0.0, 0.1, 12, perceptron(256, 256)),
    }


# ---- a run


def split(data: Data, size: int, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``size`` random inputs, their labels with noise, and the indices of the other examples."""
    order = torch.randperm(len(data[1]), generator=stream(seed, "split"))
    on, classes = order[:size], int(data[1].max()) + 1
    return data[0][on], noisy(data[1][on], noise, classes, seed), order[size:]


def batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of batches without end, in a new order every epoch; a short last batch is dropped."""
    random = stream(seed, "order")
    while True:
        yield from torch.randperm(n, generator=random).split(size)[: n // size]


def train(task: Task, data: Data, variant: Variant, rho: float, rate: float, seed: int) -> dict[str, Any]:
    """Return validation error, test error (in per cent) and passes of one run; the halves of the rest are the two."""
    x, y, rest = split(data, task.size, task.noise, seed)
    torch.manual_seed(seed)
    model = task.model(x[0], int(data[1].max()) + 1)
    lr, steps = rate * task.lr, task.epochs * (task.size // variant.batch)
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    optimizer = variant.make(base, rho, lr, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    passes = 0.0
    for on in islice(batches(task.size, variant.batch, seed), steps):
        optimizer.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x[on], y[on]))
        passes += getattr(optimizer, "telemetry", steppe.Telemetry(forwards=1, backwards=1)).passes
        schedule.step()
    model.eval()
    with torch.no_grad():
        wrong = 100 * (model(data[0][rest]).argmax(1) != data[1][rest]).float()
    half = len(rest) // 2
    return {"val": wrong[:half].mean().item(), "test": wrong[half:].mean().item(), "passes": passes / steps}


def main() -> None:
    """Train what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--fortunes", type=Path, default=Path("/usr/share/games/fortunes"))
    parser.add_argument("--tasks", nargs="+", default=[])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    keys = ("task", "variant", "rho", "rate", "epochs", "seed")
    done = {tuple(run[key] for key in keys) for run in found}
    chosen = {name: task for name, task in tasks(args.fortunes).items() if name in (args.tasks or [name])}
    data = {name: task.data() for name, task in chosen.items()}
    with args.results.open("a") as file:
        for seed in args.seeds:
            for variant in args.variants:
                for name, task in chosen.items():
                    v = VARIANTS[variant]
                    for rho, rate in product(v.radii, v.rates):
                        key = (name, variant, rho, rate, task.epochs, seed)
                        if key not in done:
                            run = train(task, data[name], v, rho, rate, seed)
                            file.write(json.dumps(dict(zip(keys, key, strict=True)) | run) + "\n")
                            file.flush()


if __name__ == "__main__":
    main()
