"""Where the time of a step goes: its floor at the machine's rates, its kernels, and everything else.

Every call that reaches torch's dispatcher is timed inside the step itself, with the caches and the memory as they are
there, less what a call on one number takes. Calls whose operations are counted (matrix products, convolutions,
attention) are the products, all others that move bytes the other kernels. What remains of the step's time is Python,
autograd, dispatch and allocation. On a GPU times are between events, and each call is queued behind a pause, so that
the host's own time is not in them.

The floor of a call is ``max(operations / rate, bytes / bandwidth)``, with the best rate of large products or of
convolutions and the best bandwidth of a copy of at least that many bytes, measured beside the model. A step's floor is
the sum over its calls, because kernels run one after another. Bytes are those of the operands: what fusing kernels
would save is not taken off, and a table from which rows are gathered counts whole.

Page faults are counted beside: large tensors may get fresh memory from the system at every step, which it has to map
and clear. Their time (their number, at the price of one, measured likewise) is part of that of the kernels.

``python -m benchmarks.floor --threads 1 --out benchmarks/records/m_sam_floor_cpu.json``
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import record
from benchmarks.calls import Call, Calls
from benchmarks.m_sam import Bench, steady
from benchmarks.models import CASES
from benchmarks.rates import Rates, faults
from benchmarks.timing import Timer, synchronize

MODELS = ("digits_mlp", "mlp", "cnn", "resnet18_w16", "vit_small", "gpt_small")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Way:
    """One way to step, with its samples: seconds in products and in other kernels, and the last sample's calls."""

    about: dict[str, Any]
    timer: Timer
    products: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def sample(self, empty: float) -> None:
        """Time the step as it is, then call by call."""
        timer = self.timer
        timer.step()  # the allocator forgets what the way before it left
        before = faults()
        timer.seconds.append(timer.once())
        self.faults.append((faults() - before) / timer.repeats)
        with Calls(timer.device) as calls:
            for _ in range(timer.repeats):
                timer.step()
        synchronize(timer.device)
        self.calls = [call for call in calls.made if call.bytes]
        for samples, product in ((self.products, True), (self.others, False)):
            samples.append(sum(max(0.0, call.seconds - empty) for call in self.of(product)) / timer.repeats)

    def of(self, product: bool) -> list[Call]:
        """The calls that are products, or not."""
        return [call for call in self.calls if call.product == product]

    def row(self, rates: Rates) -> dict[str, Any]:
        """Medians, floors and counts of a step."""
        seconds = self.timer.seconds
        row: dict[str, Any] = {"rounds": len(seconds)}
        row |= {name: round(1e3 * of(seconds), 4) for name, of in (("ms", median), ("low", min), ("high", max))}
        for name, product, samples in (("product", True, self.products), ("other", False, self.others)):
            calls, steps = self.of(product), self.timer.repeats
            row[f"{name}_ms"] = round(1e3 * median(samples), 4)
            row[f"{name}_floor_ms"] = round(1e3 * sum(map(rates.floor, calls)) / steps, 4)
            row[f"{name}_bytes"] = sum(call.bytes for call in calls) // steps
            row[f"{name}_calls"] = len(calls) // steps
        row["fault_ms"] = round(1e3 * rates.fault * median(self.faults), 4)
        return self.about | row | {"flops": sum(call.flops for call in self.calls) // self.timer.repeats}


def measure(name: str, args: argparse.Namespace) -> tuple[Rates, list[dict[str, Any]]]:
    """The machine's rates, and the rows of one model: SAM, m-SAM in two passes and RW-SAM, in interleaved rounds."""
    bench = Bench.of(CASES[name], torch.device(args.device), args.dtype, args.batch_size)
    rates = Rates.of(bench.device, DTYPES[args.dtype])
    n = len(bench)
    sizes = sorted({m for m in args.ms if n % m == 0} | {n})
    ways = []
    for way, m in [("sam", None), *(("parallel", m) for m in sizes), ("rw_exact", None)]:
        timer = Timer(bench.step(way, m), bench.device)
        timer.prepare(args.rounds, args.time_limit)
        ways.append(Way({"model": name, "batch_size": n, "way": way, "m": m}, timer))
    for _ in range(min(way.timer.rounds for way in ways)):
        for way in ways:
            way.sample(rates.call)
    return rates, [way.row(rates) for way in ways]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(MODELS))
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 8], help="beside the whole batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds that plain steps of a row may take")
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def shown(row: dict[str, Any]) -> str:
    """A line for the terminal."""
    parts = [f"{name} {row[f'{name}_ms']:.2f} (floor {row[f'{name}_floor_ms']:.2f})" for name in ("product", "other")]
    return f"{row['model']:14} {row['way']:10} m={row['m']!s:5} {row['ms']:.2f} ms: {', '.join(parts)}"


def main() -> None:
    """Measure and write."""
    steady()
    record.steady_memory()
    args = arguments()
    torch.set_num_threads(args.threads)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", "threads")} | {"rates": {}}
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rates, found = measure(name, args)
        settings["rates"][name] = rates.as_record()
        print(rates.as_record(), *map(shown, found), sep="\n", flush=True)
        rows += found
        if args.out:
            record.write(args.out, "floor", torch.device(args.device), settings, rows)


if __name__ == "__main__":
    main()
