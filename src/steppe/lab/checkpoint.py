"""Everything a run needs to go on, in one file that is always whole: the old one or the new."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steppe.lab.settings import LabError

FORMAT = 1


def write(path: Path, data: dict[str, Any]) -> None:
    """Write through a temporary file beside the target; once this returns, the new file survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **data}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote, on the CPU.

    Raises:
        LabError: the file is damaged or no checkpoint of this format.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch make of damaged bytes
        reason = str(error).partition("\n")[0]
        raise LabError(f"{path} is damaged ({reason}); delete it to start the run again") from None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise LabError(f"{path} is no checkpoint of format {FORMAT}; delete it to start the run again")
    return data


def whole(data: Any) -> Any:
    """Return nested data with every sharded tensor gathered; every process must call this."""
    if hasattr(data, "full_tensor"):  # a DTensor; importing its module takes longer than a short run
        return data.full_tensor()
    if isinstance(data, dict):
        return {key: whole(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(whole(value) for value in data)
    return data


def sharded(tensor: Any, like: Any) -> Any:
    """Return a gathered tensor sharded as `like` is; anything else as it came."""
    if hasattr(like, "full_tensor") and isinstance(tensor, Tensor) and tensor.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor


def random_state() -> dict[str, Any]:
    """Return every global stream of random numbers, in a form that needs no pickled code."""
    version, numbers, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(numbers), gauss],
        "numpy": {**legacy, "state": {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}},
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every global stream where `random_state` found it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
