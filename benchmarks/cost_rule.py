"""Whether the rule that holds gradients whole or as factors chooses the faster way, by linear layers of many shapes.

Each layer's share of a step is timed both ways: the norms of every micro-batch's gradient, the perturbed forward, its
backward. ``python -m benchmarks.cost_rule --threads 1 --out benchmarks/records/cost_rule_cpu.json``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.timing import Timer
from steppe.factored.cost import TWO_PASSES
from steppe.factored.held import Held, Pool
from steppe.factored.linear import Blocks, FactoredLinear, HeldLinear
from steppe.factored.parts import Parts
from steppe.factored.terms import Dense, Factored, Product, squared_norms

SHAPES = ((64, 64), (128, 512), (256, 256), (10, 1024), (1024, 1024), (768, 3072))  # height, width
ROWS = (1, 4, 16, 64, 256)  # of one micro-batch
TOTAL = 1024  # rows of the batch


def ways(height: int, width: int, rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """One layer's share of a step, held and as factors."""
    parts = Parts(TOTAL // rows, 1)
    random = lambda *size: torch.randn(*size, device=device)  # noqa: E731
    a, delta, x, d = (random(parts.n, rows, size) for size in (width, height, width, height))
    W, b = random(height, width).requires_grad_(), random(height).requires_grad_()
    x.requires_grad_()
    pool = Pool()

    def scale(gradient: Held | Factored) -> Tensor:
        return 0.05 * squared_norms([gradient], []).rsqrt()

    def held() -> object:
        with torch.no_grad():
            gradient = Held([Dense(delta, a)], parts, pool)
            weights = Blocks(gradient, scale(gradient), W, x.dtype)
        return torch.autograd.grad(HeldLinear.apply(x, W, b, weights, [None]), (x, W, b), d)  # type: ignore[no-untyped-call]

    def factored() -> object:
        with torch.no_grad():
            gradient = Factored([Dense(delta, a)], parts)
            product = Product(gradient, scale(gradient))
        return torch.autograd.grad(FactoredLinear.apply(x, W, b, product, None), (x, W, b), d)  # type: ignore[no-untyped-call]

    return {"held": held, "factored": factored}


def measure(height: int, width: int, rows: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds both ways, interleaved; what the rule chooses, and what that costs beyond the faster one."""
    timers = {name: Timer(step, device) for name, step in ways(height, width, rows, device).items()}
    for timer in timers.values():
        timer.prepare(rounds, 1.0, 0.02)
    for _ in range(rounds):
        for timer in timers.values():
            timer.seconds.append(timer.after_itself())
    ms = {name: 1e3 * median(timer.seconds) for name, timer in timers.items()}
    chosen = "held" if TWO_PASSES.whole(rows, height, width) else "factored"
    row = {"height": height, "width": width, "rows": rows, "parts": TOTAL // rows, "chosen": chosen}
    return row | {name: round(t, 4) for name, t in ms.items()} | {"regret": round(ms[chosen] / min(ms.values()) - 1, 4)}


def main() -> None:
    """Measure and write."""
    record.steady_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, rows = torch.device(args.device), []
    for height, width in SHAPES:
        for r in ROWS:
            rows.append(measure(height, width, r, device, args.rounds))
            print(*rows[-1].items(), flush=True)
    if args.out:
        settings = {"device": args.device, "rounds": args.rounds, "total": TOTAL, "note": args.note}
        record.write(args.out, "cost_rule", device, settings, rows)


if __name__ == "__main__":
    main()
