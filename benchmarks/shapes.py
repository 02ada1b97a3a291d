"""Measure what changing lengths and a frozen model cost m-SAM and SAM on a ``Batch``: time, shared passes, memory.

``python -m benchmarks.shapes --out benchmarks/records/shapes_cpu.json``. Another length at every step is what a batch
has that is padded to its longest text. Times are CPU times of this process, SAM's beside those of
``parallel=False`` step by step, rehearsals included. Memory is the growth of the process for lengths, and for LoRA the
peak of what a step allocates (``benchmarks/memory.py``), of a ``Batch`` beside a closure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from benchmarks import record
from benchmarks.memory import peak
from benchmarks.models import GPT, VOCABULARY, classify, sgd, tokens, with_lora
from benchmarks.timing import Timer

N, LONGEST = 16, 256
CPU = torch.device("cpu")


class Cut(GPT):
    """A causal transformer for texts of up to ``LONGEST`` tokens."""

    def __init__(self) -> None:
        super().__init__(64, 2, 4)
        self.positions = nn.Embedding(LONGEST, 64)
        self.mask = nn.Transformer.generate_square_subsequent_mask(LONGEST)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next token."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        mask = self.mask[: tokens.shape[1], : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def of_lengths(lengths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch of random tokens of each length."""
    for length in lengths:
        index = torch.randint(VOCABULARY, (N, length))
        yield index, index.roll(-1, 1)


def times(lengths: list[int]) -> list[dict[str, Any]]:
    """Return the CPU time of SAM and m-SAM over all lengths, as ratios to SAM's with ``parallel=False``."""
    ways: dict[str, dict[str, Any]] = {
        "SAM, parallel=False": {"parallel": False}, "SAM": {}, "m-SAM, m=4": {"m": 4},
        "m-SAM, m=4, parallel=False": {"m": 4, "parallel": False},
    }  # fmt: skip
    models = {way: Cut() for way in ways}
    opts = {way: steppe.SAM(sgd(models[way]), rho=0.05, **options) for way, options in ways.items()}
    forwards, taken = dict.fromkeys(ways, 0), {way: list[float]() for way in ways}
    passes: dict[str, list[int]] = {way: [] for way in ways}
    for way, model in models.items():

        def count(*_: object, way: str = way) -> None:
            forwards[way] += 1

        model.register_forward_pre_hook(count)
    for data in of_lengths(lengths):
        for way, opt in opts.items():
            batch, forwards[way] = steppe.Batch(models[way], classify, data), 0
            taken[way].append(Timer(partial(opt.step, batch), CPU, clock=process_time).once())
            passes[way].append(forwards[way])
    usual = taken["SAM, parallel=False"]
    return [
        {
            "what": f"{len(lengths)} lengths in {len(lengths)} steps",
            "way": way,
            "seconds": round(sum(taken[way]), 3),
            "ratio": round(sum(taken[way]) / sum(usual), 3),
            "ratio_of_a_step": round(median(a / b for a, b in zip(taken[way], usual, strict=True)), 3),
            "steps_of_two_forwards": passes[way].count(2),
            "forwards": sum(passes[way]),
        }
        for way in ways
    ]


def resident() -> float:
    """Return the resident memory of this process in MiB, without what the C library keeps of freed memory."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(lengths: list[int]) -> list[dict[str, Any]]:
    """Return how the resident memory grows from the tenth length on; the first is the longest."""
    found = []
    for way in ("SGD", "m-SAM, m=4"):
        model = Cut()
        opt = sgd(model) if way == "SGD" else steppe.SAM(sgd(model), rho=0.05, m=4)
        for step, data in enumerate(of_lengths(lengths), 1):
            opt.step(steppe.Batch(model, classify, data))
            if step == 10:
                before = resident()
        grown = round(resident() - before, 1)
        found.append({"what": f"resident memory, lengths 10 to {len(lengths)}", "way": way, "grown_mib": grown})
    return found


def lora() -> list[dict[str, Any]]:
    """Return the peak of SAM's step on LoRA with a closure, and with a batch."""
    model = with_lora(GPT(128, 4, 4))
    opt, data = steppe.SAM(sgd(model), rho=0.05), tokens(N)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = classify(model, data).mean()
        loss.backward()
        return loss

    found = []
    for way, argument in (("closure", closure), ("Batch", steppe.Batch(model, classify, data))):
        most = max(peak(partial(opt.step, argument), CPU) for _ in range(3))
        found.append({"what": "peak of SAM's step, LoRA", "way": way, "mib": round(most / 2**20, 2)})
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, default=60, help="timed")
    parser.add_argument("--memory", type=int, default=200, help="lengths for the resident memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    chosen = random.Random(0)
    timed = chosen.sample(range(4, 4 + options.lengths), options.lengths)
    longest = 4 + options.memory
    rows = [*times(timed), *memory([longest, *chosen.sample(range(4, longest), options.memory - 1)]), *lora()]
    for row in rows:
        print(row, flush=True)
    if options.out:
        settings = {"examples": N, "model": "a GPT of width 64, 2 layers; LoRA: width 128, 4 layers, rank 8"}
        record.write(options.out, "shapes", CPU, settings, rows)


if __name__ == "__main__":
    main()
