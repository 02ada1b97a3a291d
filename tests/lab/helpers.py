"""Small comparisons that take a moment, and a data folder in the idx format."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import torch
from typer.testing import CliRunner

from steppe.lab import spec
from steppe.lab.commands.group import app
from steppe.lab.runs import Plan, Run, finish, open_for
from steppe.lab.settings import Settings
from steppe.lab.train import Session

TINY = Settings(train_size=256, batch_size=64, epochs=3, model="mlp-16")


def run(text: str, seed: int = 0, settings: Settings = TINY) -> Run:
    return Run(spec.parse(text), seed, settings)


def trained(folder: Path, *methods: str, seeds: int = 2, settings: Settings = TINY) -> Plan:
    """Fill a run directory in this process, weights included."""
    plan = open_for(folder, Plan(settings, tuple(map(spec.parse, methods)), seeds))
    for each in plan.runs():
        session = Session(each)
        deque(session.fit(), maxlen=0)
        finish(folder, each, session.record(), session.model.state_dict())
    return plan


def steppe_cli(*arguments, env=None):
    """Call the command line in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env, prog_name="steppe", terminal_width=200)


class Process:
    """The command line in a process group of its own."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "steppe", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # a shell's background job hands down an ignored Ctrl-C
        heard = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        self.process = subprocess.Popen(command, **heard, **pipes)

    def until(self, holds):
        deadline = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < deadline, "not in time"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def interrupt(self):
        """Press a terminal's Ctrl-C, which reaches every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self):
        """Return output and exit code once every process that could write to the pipe is gone."""
        return self.process.communicate(timeout=60)[0], self.process.returncode


def write_idx(path: Path, data: torch.Tensor) -> None:
    head = bytes((0, 0, 8, data.ndim)) + b"".join(size.to_bytes(4, "big") for size in data.shape)
    raw = head + bytes(data.flatten().tolist())
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_images(folder: Path, train: int = 96, test: int = 40, side: int = 8, suffix: str = ".gz") -> Path:
    """Write images whose brightness tells their class."""
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = (labels[:, None, None] * 25).expand(count, side, side)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return folder
