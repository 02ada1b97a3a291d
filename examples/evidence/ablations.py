"""The cheap forms of m-SAM with one thing changed at a time: size and number of the draws, clipping, the batch, ...

    python examples/evidence/ablations.py RESULTS.jsonl           # trains what the file lacks, a line a run
    python tools/ablation_tables.py RESULTS.jsonl                       # the record and the tables of docs/results.md

Every arm trains at one learning rate for one length. Its radius is chosen on validation examples with clean labels, of
all radii with the first seed, then of the two best with all seeds. So the gains are larger than in the studies, where
everything is tuned: here the question is what makes the effect.
``tools/ablation_tables.py`` knows which arms answer which question. MNIST-1D needs the package ``mnist1d``.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
Key = tuple[str, str, float, int]  # task, arm, radius, seed
sys.path.append(str(ROOT))

from benchmarks.near_sgd_resnet import data as clothes  # noqa: E402
from benchmarks.near_sgd_resnet import model as resnet  # noqa: E402
from benchmarks.near_sgd_variants import (  # noqa: E402
    Data,
    Task,
    Variant,
    control,
    digits,
    mnist_1d,
    perceptron,
    rule,
    sam,
    scheduled,
    train,
)

from steppe.schedule import Window  # noqa: E402

SMALL, USUAL, LARGE = (0.02, 0.05, 0.1, 0.2), (0.05, 0.1, 0.2, 0.4), (0.1, 0.2, 0.4, 0.8)
PLAIN = Variant(lambda base, rho, lr, steps: base, (0.0,))
LATER = {share: lambda rho, lr, steps, share=share: Window(rho, round(share * steps)) for share in (0.1, 0.3)}


def fashion() -> Data:
    """Return 4,000 images of Fashion-MNIST at 14 x 14."""
    inputs, labels, _, _ = clothes()
    return inputs[:4000], labels[:4000]


def group_norm(channels: int) -> nn.GroupNorm:
    """Return group norm of eight channels a group."""
    return nn.GroupNorm(channels // 8, channels)


def at_batch(arm: Variant, batch: int, lr: float = 1.0) -> Variant:
    """Return an arm at another batch size; the learning rate grows with it."""
    return Variant(arm.make, arm.radii, batch, (lr * batch / 128,))


def at_rate(arm: Variant, rate: float) -> Variant:
    """Return an arm at a multiple of the task's learning rate."""
    return Variant(arm.make, arm.radii, arm.batch, (rate,))


NOISY = {
    "SGD": PLAIN,
    "SAM": sam(LARGE),
    "m-SAM, m = 16": sam(USUAL, m=16),
    **{f"sampled, m = {m}": sam(SMALL if m < 8 else USUAL, m=m, sampled=1) for m in (1, 4, 8, 16, 32)},
    **{f"sampled, {k} draws of {m}": sam(USUAL, m=m, sampled=k) for k, m in ((4, 4), (2, 8), (2, 16), (4, 16))},
    **{f"sampled, m = 16, clip {clip}": sam(USUAL, m=16, sampled=1, clip=clip) for clip in (0.25, 0.5, 1.0, 2.0)},
    **{f"ascent on {m}": sam(LARGE, ascent=m) for m in (4, 16, 64)},
    "control: difference on another draw": rule(lambda lr: control, USUAL),
    **{f"sampled, m = 16, after {share:.0%}": scheduled(of, m=16, sampled=1) for share, of in LATER.items()},
    "SAM, batch 16": at_batch(sam(USUAL), 16),
    "SGD, batch 16": at_batch(PLAIN, 16),
}
for _n in (32, 64, 256):
    NOISY |= {f"{name}, batch {_n}": at_batch(NOISY[name], _n)
              for name in ("SGD", "SAM", "m-SAM, m = 16", "sampled, m = 16")}  # fmt: skip
_FORMS = {
    "SGD": PLAIN,
    "SAM": sam(),
    "m-SAM, m = 16": sam(m=16),
    "sampled, m = 16": sam(m=16, sampled=1),
    "sampled, m = 16, clip 0.5": sam(m=16, sampled=1, clip=0.5),
    "ascent on 16": sam((0.1, 0.2, 0.4), ascent=16),
}
RATES = {f"{name}, lr {0.4 * rate:g}": at_rate(arm, rate) for rate in (0.125, 0.5, 1.0) for name, arm in _FORMS.items()}
_CHEAP = {name: _FORMS[name] for name in ("SGD", "SAM", "sampled, m = 16", "ascent on 16")}
_RESNET = partial(Task, fashion, 1000, 0.4, 0.1, 20)

TASKS = {
    "digits, 40 % noise": (Task(digits, 600, 0.4, 0.05, 60, perceptron(256, 256)), NOISY, 5),
    "MNIST-1D": (Task(mnist_1d, 3000, 0.0, 0.4, 20, perceptron(256, 256, 256)), RATES, 3),
    "ResNet, batch norm": (_RESNET(resnet), _CHEAP, 3),
    "ResNet, group norm": (_RESNET(partial(resnet, norm=group_norm)), _CHEAP, 3),
}


def wanted(task: str, found: dict[Key, dict[str, float]]) -> Iterator[Key]:
    """Yield what is to be trained: every radius with the first seed, the two best of it with the others."""
    _, arms, seeds = TASKS[task]
    for seed, (name, arm) in product(range(seeds), arms.items()):
        radii = sorted(arm.radii, key=lambda rho: found[task, name, rho, 0]["val"])[:2] if seed else arm.radii
        yield from ((task, name, rho, seed) for rho in radii)


def main() -> None:
    """Train what the file lacks."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path)
    options.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    given = options.parse_args()
    torch.set_num_threads(1)
    lines = map(json.loads, given.results.read_text().splitlines() if given.results.exists() else [])
    found: dict[Key, dict[str, float]] = {tuple(line["key"]): line for line in lines}
    with given.results.open("a") as file:
        for name in given.task:
            task, arms, _ = TASKS[name]
            data = task.data()
            for key in wanted(name, found):
                if key not in found:
                    _, arm, rho, seed = key
                    found[key] = train(task, data, arms[arm], rho, arms[arm].rates[0], seed)
                    file.write(json.dumps({"key": key} | found[key]) + "\n")
                    file.flush()


if __name__ == "__main__":
    main()
