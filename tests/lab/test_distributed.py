"""Two processes through Lightning Fabric, on the CPU, against one process."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steppe.lab import checkpoint, files, single
from steppe.lab.errors import LabError
from steppe.lab.hardware import Hardware
from steppe.lab.record import Record
from steppe.lab.train import Session
from tests.processes import Forked

from .helpers import TINY, run

pytest.importorskip("lightning_fabric", reason="the optional package lightning-fabric is not installed")

SETTINGS = replace(TINY, train_size=255, epochs=14)  # 42 steps; evaluations whose examples two do not share equally
METHODS = {"fsdp-wsam": "WSAM(rho=0.1)"}  # the others have SGD


def as_rank(rank: int, port: int, folder: Path, names: tuple[str, ...]) -> None:
    """Train one run after another, as a process of torchrun's."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in (numbers | where).items()}
    torch.set_num_threads(1)
    for name in names:
        strategy = "fsdp" if name.startswith("fsdp") else "ddp"
        options = {"watch": leave} if name == "cut" else {}
        asked = run(METHODS.get(name, "SGD"), settings=SETTINGS)
        single.run(asked, folder / name.removesuffix("-on"), Hardware(strategy=strategy), 10, **options)


def leave(session: Session, line: dict) -> None:
    if session.step >= 25:
        os._exit(7)


def two(folder: Path, *names: str) -> int:
    """Run serially in two processes; return the exit code of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = (Forked(as_rank, rank, port, folder, names) for rank in (0, 1))
    output, code = first.end(300)
    if code:
        second.kill()
    assert code == 0 or "cut" in names, output
    second.end()
    return code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Whole runs with DDP and FSDP2, and one that a process left at step 25."""
    folder = tmp_path_factory.mktemp("two")
    assert two(folder, "ddp", "fsdp", "fsdp-wsam", "cut") == 7
    return folder


def weights(folder):
    """The final weights of the one run in a folder."""
    return torch.load(next((folder / "weights").iterdir()), weights_only=True)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp-wsam"])
def test_two_processes_compute_what_one_computes(tmp_path, made, name):
    alone = single.run(run(METHODS.get(name, "SGD"), settings=SETTINGS), tmp_path / "one")
    together = files.load(next((made / name / "runs").iterdir()), Record)
    a, b = weights(tmp_path / "one"), weights(made / name)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)
    kind = "DDPStrategy" if name == "ddp" else "ModelParallelStrategy"
    assert together.environment["processes"] == f"2 ({kind})"
    assert together.curves["train_loss"] == pytest.approx(alone.curves["train_loss"], rel=1e-4)
    assert together.test_error == pytest.approx(alone.test_error, abs=2 / 1542)


def test_two_processes_resume_bit_for_bit(made):
    assert checkpoint.read(made / "cut" / "checkpoints" / "sgd-s0.pt")["step"] == 20
    assert two(made, "cut-on") == 0
    a, b = weights(made / "ddp"), weights(made / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_must_be_shared_equally():
    process = replace(Hardware().open(), rank=1, world=3)
    assert process.share(torch.arange(6)).tolist() == [1, 4]
    with pytest.raises(LabError, match="batch size 64 is no multiple of the 3 processes"):
        Session(run("SGD"), process)


def test_torchrun_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert Hardware()._launched() == (4, 3)
