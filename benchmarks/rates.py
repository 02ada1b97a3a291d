"""What a machine attains: operations and bytes a second, and what calls and fresh memory cost by themselves."""

from __future__ import annotations

import mmap
import resource
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from benchmarks.calls import Call, Calls
from benchmarks.timing import Timer, synchronize

SIZES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}  # of square matrices
IMAGES = {"cpu": 32, "cuda": 512}  # in a convolution
CHANNELS = ((64, 32), (128, 16), (256, 8))  # of a convolution, and the side of its images
COPIES = [2**k for k in range(16, 29, 2)]  # bytes read and written, in and out of the caches
CALLS = 200  # on one number
FRESH = 2**26  # bytes that an allocator surely asks the system for


@dataclass(frozen=True)
class Rates:
    """Operations a second by kind, bytes a second of copies by size, seconds of an empty call and of a page fault."""

    operations: dict[str, float]
    bandwidth: dict[int, float]
    call: float
    fault: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Rates:
        """Measured now: the best of several shapes."""
        copies = {n: copied(n, device) for n in COPIES}
        return cls(
            operations={
                "matrix": max(multiplied(n, device, dtype) for n in SIZES[device.type]),
                "convolution": max(convolved(c, side, device, dtype) for c, side in CHANNELS),
            },
            bandwidth={n: max(rate for k, rate in copies.items() if k >= n) for n in COPIES},
            call=empty_call(device),
            fault=page_fault() if device.type == "cpu" else 0.0,
        )

    def floor(self, call: Call) -> float:
        """Seconds of a call at these rates: of its operations or of its bytes, whichever takes longer."""
        largest = max(self.bandwidth)
        copy = min((n for n in self.bandwidth if n >= call.bytes), default=largest)
        operations = call.flops / self.operations[call.kind] if call.product else 0.0
        return max(operations, call.bytes / self.bandwidth[copy])

    def as_record(self) -> dict[str, Any]:
        """For the settings of a record: 1e9 operations and bytes a second, microseconds."""
        return {
            "gflops": {kind: round(rate / 1e9, 1) for kind, rate in self.operations.items()},
            "gigabytes": {str(n): round(rate / 1e9, 1) for n, rate in self.bandwidth.items()},
            "call_us": round(1e6 * self.call, 2),
            "fault_us": round(1e6 * self.fault, 3),
        }


def best(step: Callable[[], object], device: torch.device) -> float:
    """The least seconds of some samples."""
    timer = Timer(step, device)
    timer.prepare(5, 0.3, sample=0.02)
    return min(timer.once() for _ in range(timer.rounds))


def copied(count: int, device: torch.device) -> float:
    """Bytes a second of copies that read and write ``count`` in all."""
    a, b = (torch.ones(count // 8, device=device) for _ in range(2))
    return count / best(lambda: a.copy_(b), device)


def multiplied(n: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of ``n x n`` matrices."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / best(lambda: a @ b, device)


def convolved(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a 3 x 3 convolution, as many channels out as in."""
    shapes = (IMAGES[device.type], channels, side, side), (channels, channels, 3, 3)
    x, w = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return 2 * x.numel() * w[0].numel() / best(lambda: F.conv2d(x, w, padding=1), device)


def empty_call(device: torch.device) -> float:
    """Seconds of a call on one number, as :class:`Calls` times it."""
    number = torch.zeros(1, device=device)
    with Calls(device) as calls:
        for _ in range(CALLS):
            number + number
    synchronize(device)
    return median(call.seconds for call in calls.made)


def faults() -> int:
    """Page faults of this process so far: memory that the system had to map and clear, a page at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def page_fault() -> float:
    """Seconds of one: what the first writing to memory fresh from the system takes beyond the second."""
    found = []
    for _ in range(5):
        fresh = torch.frombuffer(mmap.mmap(-1, FRESH), dtype=torch.uint8)
        before, start = faults(), perf_counter()
        fresh.fill_(1)
        first, count, start = perf_counter() - start, faults() - before, perf_counter()
        fresh.fill_(1)
        found.append((first - (perf_counter() - start)) / count if count else 0.0)
        del fresh
    return max(0.0, min(found))
