"""Measure the step time of m-SAM as a ratio to SAM's: serial, by vmap, and in two passes over the whole batch.

``python -m benchmarks.m_sam --models mlp cnn --threads 1 --out benchmarks/records/m_sam_cpu.json``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import steppe
from benchmarks import record
from benchmarks.memory import peak
from benchmarks.models import CASES, Case
from benchmarks.timing import Timer, interleave
from benchmarks.vmap_sam import VmapSAM
from steppe.factored import plans
from steppe.factored.passes import FirstPass
from steppe.factored.sites import Interception

WAYS = ("serial", "vmap", "parallel", "rw_exact", "rw_difference")
Step = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """One model and batch, on a device, in a precision; every step shares them."""

    model: nn.Module
    data: tuple[Tensor, Tensor]
    loss: Callable[..., Tensor]
    device: torch.device

    @classmethod
    def of(cls, case: Case, device: torch.device, dtype: str = "float32", batch_size: int | None = None) -> Bench:
        """Return a case's model and batch; ``dtype`` is float32 or bf16, which is autocast."""
        torch.manual_seed(0)
        n = batch_size or (case.batch_size if device.type == "cuda" else case.cpu_batch_size)
        data = tuple(t.to(device) for t in case.data(n))
        context = (lambda: torch.autocast(device.type, torch.bfloat16)) if dtype == "bf16" else nullcontext

        def loss(model: Any, data: Any) -> Tensor:
            with context():
                return case.loss(model, data).float()

        return cls(case.model().to(device), data, loss, device)

    def __len__(self) -> int:
        return len(self.data[0])

    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def base(self) -> torch.optim.Optimizer:
        """Return SGD with a step so small that the weights hardly change."""
        return torch.optim.SGD(self.model.parameters(), lr=1e-5)

    def step_of(self, optimizer: steppe.SharpnessAware) -> Step:
        """Return a function that makes one step on the batch."""
        return lambda: optimizer.step(steppe.Batch(self.model, self.loss, self.data))

    def step(self, way: str, m: int | None = None) -> Step:
        """Return a function that makes one step in the given way."""
        if way == "vmap":
            optimizer = VmapSAM(self.base(), self.model, self.loss, m or len(self))
            return lambda: optimizer.step(self.data)
        if way == "rw_difference":
            return self.step_of(rw_sam(self.base(), steppe.FiniteDifference(), parallel=False))
        if way == "rw_exact":
            return self.step_of(rw_sam(self.base(), steppe.Exact()))  # type: ignore[attr-defined]
        return self.step_of(steppe.SAM(self.base(), m=m, parallel=way == "parallel"))


def rw_sam(base: torch.optim.Optimizer, probe: Any, **options: Any) -> steppe.SharpnessAware:
    """Return RW-SAM with the given probe."""
    return steppe.SharpnessAware(base, steppe.Rule(sample=steppe.Reweighted(0.5, probe)), 0.05, **options)


def wanted(ways: list[str], ms: list[int], n: int) -> Iterator[tuple[str, int | None]]:
    """Yield ways and micro-batch sizes, the largest first: the time of smaller ones is predicted from them."""
    for way in ways:
        if way.startswith("rw_"):
            yield way, None
        else:
            yield from ((way, m) for m in sorted(ms, reverse=True) if m <= n and n % m == 0)


def refusal(bench: Bench, way: str, m: int | None, seconds: float, args: argparse.Namespace) -> str:
    """Return why a way is not run, or an empty string."""
    if way == "rw_exact" and not hasattr(steppe, "Exact"):
        return "steppe.Exact does not exist"
    if way == "vmap" and m is not None:
        gib = 3 * 4 * bench.parameters() * len(bench) / m / 2**30
        if gib > args.memory_limit:
            return f"its stacked weights and gradients need {gib:.1f} GiB"
    return f"predicted {seconds:.1f} s a step" if 3 * seconds > args.time_limit else ""


def predicted(known: list[tuple[float, float]], parts: float) -> float:
    """Predict the seconds of a step of so many parts: on the line through the last two runs; 0 parts: as the last."""
    if len(known) < 2 or not parts:
        return known[-1][1] if known else 0.0
    (k, t), (k_last, t_last) = known[-2:]
    return t_last + max(0.0, (t_last - t) / (k_last - k)) * (parts - k_last)


def prepared(bench: Bench, args: argparse.Namespace) -> tuple[list[tuple[dict[str, Any], Timer]], list[dict[str, Any]]]:
    """Return rows with warmed-up timers and peak memory, and rows of what is left out."""
    ready, left_out = [], []
    known: dict[str, list[tuple[float, float]]] = {way: [] for way in args.ways}  # parts and seconds of what ran
    for way, m in wanted(args.ways, args.ms, len(bench)):
        row: dict[str, Any] = {"way": way, "m": m}
        parts = len(bench) / (m or 1)
        reason = refusal(bench, way, m, predicted(known[way], 0 if way == "parallel" else parts), args)
        try:
            if not reason:
                timer = timed(bench, way, m, row, args)
                known[way].append((parts, timer.once()))
                ready.append((row, timer))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        if reason:
            left_out.append(row | {"ratio": None, "reason": reason})
    return ready, left_out


def timed(bench: Bench, way: str, m: int | None, row: dict[str, Any], args: argparse.Namespace) -> Timer:
    """Return a warmed-up timer; the row gets the peak memory."""
    timer = Timer(bench.step(way, m), bench.device)
    timer.prepare(args.rounds, args.time_limit)
    row["peak"] = peak(timer.step, bench.device)
    return timer


def outside_operators(step: Step, steps: int = 3) -> float:
    """Return the share of a step that passes outside torch's operators: in Python, and in what calls it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = perf_counter()
        for _ in range(steps):
            step()
        seconds = perf_counter() - start
    inside = sum(e.self_cpu_time_total for e in profiled.key_averages() if e.key.startswith("aten::"))
    return round(1 - inside / 1e6 / seconds, 4)


def calls(step: Step) -> dict[str, int]:
    """Return how many torch functions shared passes intercept in a step, and how many uses of parameters they see."""
    found = {"functions": 0, "sites": 0}
    called, watched = Interception.called, FirstPass.watch

    def function(self: Any, *args: Any) -> None:
        found["functions"] += 1
        called(self, *args)

    def site(self: Any, *args: Any) -> Any:
        found["sites"] += 1
        return watched(self, *args)

    Interception.called, FirstPass.watch = function, site  # type: ignore[method-assign, assignment]
    try:
        step()
    finally:
        Interception.called, FirstPass.watch = called, watched  # type: ignore[method-assign]
    return found


def measure(name: str, case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one model: SAM itself, then every way."""
    bench = Bench.of(case, torch.device(args.device), args.dtype, args.batch_size)
    about = {"model": name, "kind": case.kind, "batch_size": len(bench), "parameters": bench.parameters()}
    sam: dict[str, Any] = {"way": "sam", "m": None}
    reference = timed(bench, "sam", None, sam, args)
    ready, left_out = prepared(bench, args)
    interleave(reference, [timer for _, timer in ready])
    rows = []
    for row, timer in [(sam, reference), *ready]:
        if row["way"] in ("sam", "parallel"):
            row |= {"outside": outside_operators(timer.step)} | (calls(timer.step) if row["m"] else {})
        rows.append(about | row | timer.row() | {"peak_ratio": round(row["peak"] / sam["peak"], 4)})
    return rows + [about | row for row in left_out]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ms", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--batch-size", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds a cell may take")
    parser.add_argument("--memory-limit", type=float, default=6.0, help="GiB that vmap's stacked weights may take")
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def shown(row: dict[str, Any]) -> str:
    """Return a line for the terminal: the ratio with its range and the memory, or why there is none."""
    head = f"{row['model']:14} {row['way']:13} m={row['m']!s:5}"
    if row["ratio"] is None:
        return f"{head} - {row['reason']}"
    return f"{head} {row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})  memory {row['peak_ratio']:.2f}"


def steady() -> None:
    """Rehearse at the first step alone: most steps do not rehearse."""
    plans.Entry.due = lambda self, *_: False  # type: ignore[method-assign]


def main() -> None:
    """Measure and write the record."""
    steady()
    record.steady_memory()
    args = arguments()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", "threads")}
    for name in args.models:
        rows += measure(name, CASES[name], args)
        for row in (row for row in rows if row["model"] == name):
            print(shown(row), flush=True)
        if args.out:
            record.write(args.out, "m_sam", torch.device(args.device), settings, rows)


if __name__ == "__main__":
    main()
