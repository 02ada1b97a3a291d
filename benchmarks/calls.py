"""Every call of a step that reaches torch's dispatcher: its operations, its bytes, its time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.flops import COUNTED
from benchmarks.memory import tensors

aten = torch.ops.aten
ALLOCATED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
OVERWRITTEN = {aten.copy_, aten.fill_, aten.zero_}  # their first argument is not read
PAUSE = 200_000  # cycles for which a GPU waits before a call, for the host to be done with it


@dataclass(frozen=True)
class Call:
    """One call; ``kind`` is matrix (products, attention), convolution or other, ``marks`` when it began and ended."""

    kind: str
    flops: int
    bytes: int
    marks: tuple[Any, Any]

    @property
    def product(self) -> bool:
        """Whether its operations are counted."""
        return self.kind != "other"

    @property
    def seconds(self) -> float:
        """How long it took; on a GPU, once the device is done."""
        start, end = self.marks
        return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class Calls(TorchDispatchMode):
    """Makes a list of all calls inside."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.made: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.device.type == "cuda":
            torch.cuda._sleep(PAUSE)
        start = self.mark()
        out = func(*args, **kwargs)
        marks = start, self.mark()
        kind, flops = "other", 0
        if formula := COUNTED.get(func.overloadpacket):
            kind = "convolution" if "convolution" in str(func) else "matrix"
            flops = formula(*args, **kwargs, out_val=out)
        self.made.append(Call(kind, flops, moved(func, args, kwargs, out), marks))
        return out

    def mark(self) -> Any:
        """Now, on the device's clock."""
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes of what a call reads and writes; what it changes in place is both. Views and allocations move none."""
    inputs = tensors((args, kwargs))
    known = {t.untyped_storage()._cdata for t in inputs}
    made = [t for t in tensors(out) if t.untyped_storage()._cdata not in known]
    changed, unread = [], []
    for argument, value in arguments_of(func, args, kwargs):
        if argument.is_write:
            changed += tensors(value)
            unread += tensors(value) if argument.is_out or func.overloadpacket in OVERWRITTEN else []
    if not (made or changed) or func.overloadpacket in ALLOCATED:
        return 0
    return sum(map(size, [*inputs, *made, *changed])) - sum(map(size, unread))


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """A call's arguments as its schema has them, each with its value."""
    schema = func._schema.arguments
    yield from zip(schema, args, strict=False)
    yield from ((argument, kwargs[argument.name]) for argument in schema[len(args) :] if argument.name in kwargs)


def size(t: Tensor) -> int:
    """Bytes of a tensor's own numbers: expanded dimensions count once."""
    count = t.element_size()
    for length, stride in zip(t.shape, t.stride(), strict=True):
        count *= length if stride or not length else 1
    return count
