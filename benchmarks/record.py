"""Write and read records: what was measured, on which machine, with which settings."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import steppe
from benchmarks.memory import keep_freed
from steppe.lab.record import environment


def source() -> str:
    """Return a short hash of steppe's source, which tells what code was measured."""
    root = Path(steppe.__file__).parent
    files = sorted(path for path in root.rglob("*.py") if "lab" not in path.parts)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


SOURCE = source()  # at import: the files may change while the benchmark runs
KEPT = False  # whether freed memory is kept


def steady_memory() -> None:
    """Keep freed memory, where the C library can, so that no step pays for mapping it."""
    global KEPT
    KEPT = keep_freed()


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": environment()["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": "freed memory kept" if KEPT else "the system's",
        "torch": torch.__version__,
        "steppe": steppe.__version__,
        "source": SOURCE,
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(path: Path, benchmark: str, device: torch.device, settings: dict[str, Any], rows: list[dict]) -> None:
    """Write one JSON object, with a line for each row."""
    head = {"benchmark": benchmark, "machine": machine(device), "settings": settings}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n  {lines}\n ]\n}}\n')


def read(path: Path) -> dict[str, Any]:
    """Return a record."""
    return json.loads(path.read_text())
