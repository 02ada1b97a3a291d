"""Run jobs within a time limit; a finished job is a small JSON file, and the same command goes on with the others."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Where jobs run, and at which size.

    Args:
        device: the device.
        tiny: models and numbers of steps that a CPU can do in seconds, to try the jobs themselves.
        data: the folder of Fashion-MNIST's idx files.
        out: the folder of the records.
        until: the ``time.monotonic()`` at which no job starts any more.
    """

    device: torch.device
    tiny: bool = False
    data: Path | None = None
    out: Path = Path("gpu")
    until: float = float("inf")


class UnfinishedError(Exception):
    """A job that has kept what it did, and goes on in the next call."""


@dataclass(frozen=True)
class Job:
    """One job: its name, which is also its file's, about how many seconds it takes on an H100, and the function."""

    name: str
    seconds: float
    run: Callable[[Setting], Result]


def run_all(jobs: Iterable[Job], setting: Setting) -> int:
    """Run the jobs that have no file yet; return how many are left.

    A job that raises is written down with its error and counts as done; delete its file to run it again.
    """
    left = 0
    for job in jobs:
        path = setting.out / f"{job.name}.json"
        if path.exists():
            continue
        if time.monotonic() + (0 if setting.tiny else job.seconds) > setting.until:
            left += 1
            continue
        start = time.monotonic()
        try:
            found = job.run(setting)
        except UnfinishedError:
            left += 1
            continue
        except Exception as error:  # written down: the other jobs go on
            found = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-4000:]}
        seconds = round(time.monotonic() - start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"job": job.name, "tiny": setting.tiny, "seconds": seconds, "machine": machine(setting.device)} | found
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{job.name}: {found.get('error') or found.get('summary', 'done')} ({seconds} s)", flush=True)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return left
