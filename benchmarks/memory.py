"""Measure the memory that a step allocates, and let the process keep freed memory."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed() -> bool:
    """Let the C library keep freed memory, as a GPU's allocator does; return whether it can.

    Otherwise large tensors go back to the system and are mapped again page by page, and a step's time depends on what
    the process ran before it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(TRIM_THRESHOLD, 2**31 - 1) and mallopt(MMAP_MAX, 0))


class Storages(TorchDispatchMode):
    """Counter of the bytes of storages made inside and still alive, and of their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in tensors(out):
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self.alive:
                self.alive[key] = storage.nbytes()
                self.total += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.total)
        return out

    def forget(self, key: int) -> None:
        """Take off a storage that was freed."""
        self.total -= self.alive.pop(key)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for branch in tree for t in tensors(branch)] if isinstance(tree, list | tuple) else []


def peak(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the bytes that one step allocates."""
    if device.type == "cuda":
        gc.collect()  # garbage freed during the step would hide what the step allocates
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Storages() as storages:
        step()
    return storages.peak
