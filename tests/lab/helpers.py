"""Small comparisons that take a moment, and a data folder in the idx format."""

import gzip
import sys
import time
from collections import deque
from pathlib import Path

import torch
from typer.testing import CliRunner

from steppe import cli
from steppe.lab import spec
from steppe.lab.commands.group import app
from steppe.lab.runs import Plan, Run, finish, open_for
from steppe.lab.settings import Settings
from steppe.lab.train import Session
from tests.processes import Forked

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


def steppe_cli(*arguments, env=None, charset="utf-8"):
    """Call the command line in this process."""
    runner = CliRunner(charset=charset)
    return runner.invoke(app, [str(a) for a in arguments], env=env, prog_name="steppe", terminal_width=200)


class Process(Forked):
    """The command line in a process group of its own."""

    def __init__(self, *arguments):
        super().__init__(_command, [str(a) for a in arguments])

    def until(self, holds):
        deadline = time.monotonic() + 90
        while not holds():
            assert time.monotonic() < deadline, "not in time"
            assert self.process.is_alive(), self.end()
            time.sleep(0.01)


def _command(arguments):
    sys.argv = ["steppe", *arguments]
    cli.main()


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
