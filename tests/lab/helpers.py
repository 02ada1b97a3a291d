"""Small comparisons that take a moment, and a data folder in the idx format."""

import gzip
from pathlib import Path

import torch

from steppe.lab import record, spec
from steppe.lab.runs import Plan, Run, open_for, path_of
from steppe.lab.settings import Settings
from steppe.lab.train import train

TINY = Settings(train_size=256, batch_size=64, epochs=3, model="mlp-16")


def run(text: str, seed: int = 0, settings: Settings = TINY) -> Run:
    return Run(spec.parse(text), seed, settings)


def trained(folder: Path, *methods: str, seeds: int = 2, settings: Settings = TINY) -> Plan:
    """Fill a run directory in this process."""
    plan = open_for(folder, Plan(settings, tuple(map(spec.parse, methods)), seeds))
    for each in plan.runs():
        record.save(path_of(folder, each), train(each))
    return plan


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
