"""Checkpoints: all that a run needs to go on bit for bit, in one file."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from steppe.engine.vector import is_sharded, shard_like
from steppe.lab import files
from steppe.lab.errors import LabError


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the checkpoint in one step."""
    files.write(path, partial(torch.save, {"format": files.FORMAT, **data}))


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`write` wrote, on the CPU.

    Raises:
        LabError: the file is damaged, or a newer steppe wrote it.
    """
    try:
        return files.without_format(path, torch.load(path, map_location="cpu", weights_only=True))
    except LabError:
        raise
    except Exception as error:  # zip, pickle and torch raise many kinds for damaged bytes
        reason = str(error).partition("\n")[0]
        raise LabError(f"{path} is damaged ({reason}); delete it to start the run again") from None


def whole(data: Any) -> Any:
    """Return nested data with every sharded tensor gathered. Every process must call it."""
    return tree_map(lambda one: one.full_tensor() if is_sharded(one) else one, data)


def sharded(tensor: Any, like: Any) -> Any:
    """Return a gathered tensor sharded as ``like`` is; return anything else unchanged."""
    fits = isinstance(tensor, Tensor) and is_sharded(like) and tensor.shape == like.shape
    return shard_like(tensor.to(like.device), like) if fits else tensor


def random_state() -> dict[str, Any]:
    """Return the states of all global random generators, as plain data."""
    state: Any = np.random.get_state()
    name, key, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (name, torch.tensor(key.astype(np.int64)), *rest),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set all global random generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    name, key, *rest = state["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
