"""Evidence on Fashion-MNIST, its 60,000 images of 28 x 28: the base and its relatives, each tuned alike, in slices."""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.gpu.jobs import Job, Result, Setting, UnfinishedError

METHODS = ("SAM", "SAM(m=16)", "SAM(m=16, sampled=1)", "SAM(ascent=16)")
LARGE = {"model": "resnet18", "train-size": 60000, "epochs": 30, "precision": "bf16"}
LARGE_STUDY = {"trials": 8, "search-seeds": 1, "seeds": 5}
TINY = {"model": "cnn-4", "train-size": 120, "epochs": 1, "batch-size": 40}
TINY_STUDY = {"trials": 1, "search-seeds": 1, "seeds": 2}
UNFINISHED = 75  # the exit code of a comparison that ran out of time


def compare(setting: Setting) -> Result:
    """Run the comparison, or go on with it, until it ends or the time does."""
    if setting.data is None:
        return {"summary": "needs --data, the folder of Fashion-MNIST's idx files"}
    left = min(setting.until - time.monotonic(), 3600.0)
    if left < 30:
        raise UnfinishedError
    out = setting.out / "fashion-mnist"
    where = ["--data", "fashion-mnist", "--data-dir", str(setting.data), "--noise", "0.2", "--out", str(out)]
    how = ["--device", setting.device.type, "--workers", "1", "--minutes", f"{left / 60 - 0.3:.2f}"]
    methods = [word for method in METHODS for word in ("--method", method)]
    size = TINY | TINY_STUDY if setting.tiny else LARGE | LARGE_STUDY
    options = [f"--{key}={value}" for key, value in size.items()]
    command = [sys.executable, "-m", "steppe", "compare", *where, *how, *options, *methods]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode == UNFINISHED:
        raise UnfinishedError
    if ended.returncode:
        raise RuntimeError(ended.stderr[-2000:] or ended.stdout[-2000:])
    table = (out / "summary.md").read_text()
    return {"command": command[1:], "table": table, "summary": f"report in {out / 'report.html'}"}


JOBS = [Job("evidence/fashion-mnist", 60, compare)]
