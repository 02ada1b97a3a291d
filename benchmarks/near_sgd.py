"""Measure the step time of sampled m-SAM and of ascent on a subset as a ratio to the base optimizer's own step.

``python -m benchmarks.near_sgd --threads 1 --out benchmarks/records/near_sgd_cpu.json``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

import steppe
from benchmarks import near_sgd_resnet, record
from benchmarks.m_sam import Bench, Step, steady
from benchmarks.models import CASES, GPT, Case, images, resnet18, tokens, with_batch_norm, with_lora
from benchmarks.timing import Timer, interleave

N = 128  # examples in a batch
MODELS = {
    "mlp": CASES["mlp"],
    "cnn": CASES["cnn"],
    "resnet18_w16_bn": Case("conv", lambda: with_batch_norm(resnet18(16)), images(3, 32)),
    "resnet8_w8_bn": Case("conv", lambda: near_sgd_resnet.model(torch.empty(1, 14, 14), 10), images(1, 14)),
    "vit_small": Case("transformer", CASES["vit_small"].model, images(3, 32)),
    "gpt_small": Case("transformer", CASES["gpt_small"].model, tokens),
    "gpt_small_lora": Case("transformer", lambda: with_lora(GPT(128, 4, 4)), tokens),
}
WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sampled": lambda m: {"m": m, "sampled": 1},
    "ascent": lambda m: {"ascent": m},
    "m_sam": lambda m: {"m": m},
    "serial": lambda m: {"m": m, "parallel": False},
}


def base(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum on what is trained, with a step so small that the weights hardly change."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6, momentum=0.9)


def plain(bench: Bench) -> Step:
    """Return a function that makes the base optimizer's own step."""
    optimizer = base(bench.model)

    def step() -> None:
        steppe.Batch(bench.model, bench.loss, bench.data)()
        optimizer.step()

    return step


def sharp(bench: Bench, **options: Any) -> tuple[Step, steppe.SharpnessAware]:
    """Return a function that makes a step of SAM with these options, and the optimizer."""
    optimizer = steppe.SAM(base(bench.model), 0.05, **options)
    return bench.step_of(optimizer), optimizer


def measure(name: str, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one model: the base's own step, SAM, then every way and size."""
    bench = Bench.of(case, torch.device(args.device), "float32", args.batch_size)
    about = {"model": name, "kind": case.kind, "batch_size": len(bench), "parameters": bench.parameters()}
    clock = process_time if args.cpu_time else perf_counter
    reference = Timer(plain(bench), bench.device, clock=clock)
    reference.prepare(args.rounds, args.time_limit)
    cells = [("sam", None, {})] + [(way, m, WAYS[way](m)) for way in args.ways for m in args.ms]
    ready: list[tuple[dict[str, Any], Timer]] = []
    for way, m, options in cells:
        step, optimizer = sharp(bench, **options)
        timer = Timer(step, bench.device, clock=clock)
        timer.prepare(args.rounds, args.time_limit)
        ready.append(({"way": way, "m": m, "passes": round(optimizer.telemetry.passes, 4)}, timer))
    interleave(reference, [timer for _, timer in ready])
    rows = [({"way": "base", "m": None, "passes": 1.0}, reference), *ready]
    return [about | row | timer.row() for row, timer in rows]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["sampled", "ascent", "m_sam"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=N)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a cell may take")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread beside other work on the machine")
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write the record."""
    steady()
    record.steady_memory()
    args = arguments()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", "threads")}
    for name in args.models:
        found = measure(name, MODELS[name], args)
        for row in found:
            cell = f"{row['model']:16} {row['way']:8} m={row['m']!s:5} passes {row['passes']:.3f}"
            print(f"{cell}  {row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})  {row['ms']:.1f} ms", flush=True)
        rows += found
        if args.out:
            record.write(args.out, "near_sgd", torch.device(args.device), settings, rows)


if __name__ == "__main__":
    main()
