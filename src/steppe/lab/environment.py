"""The versions and the machine that a run was made with."""

import os
import platform
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

import steppe


def environment() -> dict[str, str]:
    """Return versions, machine and date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steppe": steppe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }


@cache
def cpu() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
