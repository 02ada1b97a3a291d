"""Checkpoints: all that a run needs to go on bit for bit, in one file."""

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steppe.lab import files
from steppe.lab.errors import LabError

FORMAT = 1


def write(path: Path, data: dict[str, Any]) -> None:
    """Replace the checkpoint in one step."""
    files.write(path, partial(torch.save, {"format": FORMAT, **data}))


def read(path: Path) -> dict[str, Any]:
    """Return what :func:`write` wrote, on the CPU.

    Raises:
        LabError: the file is damaged, or has another format.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise many kinds for damaged bytes
        reason = str(error).partition("\n")[0]
        raise LabError(f"{path} is damaged ({reason}); delete it to start the run again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise LabError(
            f"{path} is no checkpoint of format {FORMAT}, which this steppe reads; delete it to start the run again"
        )
    return data


def whole(data: Any) -> Any:
    """Return nested data with every sharded tensor gathered. Every process must call it."""
    if hasattr(data, "full_tensor"):  # a DTensor; importing its module takes longer than a short run
        return data.full_tensor()
    if isinstance(data, dict):
        return {key: whole(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(whole(value) for value in data)
    return data


def sharded(tensor: Any, like: Any) -> Any:
    """Return a gathered tensor sharded as ``like`` is; return anything else unchanged."""
    if hasattr(like, "full_tensor") and isinstance(tensor, Tensor) and tensor.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def random_state() -> dict[str, Any]:
    """Return the states of all global random generators, as plain data without pickled classes."""
    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(numbers), gauss],
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set all global random generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
