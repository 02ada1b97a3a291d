"""Two processes through Lightning Fabric, on the CPU, against one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steppe.lab import checkpoint, record, single
from steppe.lab.place import Hardware
from steppe.lab.settings import LabError
from steppe.lab.train import Session

from .helpers import TINY, run

pytest.importorskip("lightning_fabric", reason="the optional package lightning-fabric is not installed")

SCRIPT = """
import sys
from pathlib import Path
import torch
from steppe.lab import single, spec
from steppe.lab.place import Hardware
from steppe.lab.settings import Settings
from steppe.lab.train import Run
torch.set_num_threads(1)
method, folder, strategy, stop = sys.argv[1:]
class Stopped(Exception): pass
def watch(session, line):
    if session.step >= int(stop):
        import os; os._exit(7)
settings = Settings(train_size=255, batch_size=64, epochs=14, model="mlp-16")
single.run(Run(spec.parse(method), 0, settings), Path(folder), Hardware(strategy=strategy), 10, watch=watch)
"""
SETTINGS = replace(TINY, train_size=255, epochs=14)  # 42 steps; evaluations whose examples two do not share equally


def two(method: str, folder: Path, strategy: str = "ddp", stop: int = 999) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, script, method, folder, strategy, str(stop)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert ran.returncode == 0 or stop < 999, ran.stderr
    return ran.returncode


def weights(folder):
    return checkpoint.read(folder / "checkpoint.pt")["model"]


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_computes(tmp_path, strategy):
    asked = run("SGD", settings=SETTINGS)
    alone = single.run(asked, tmp_path / "one")
    two("SGD", tmp_path / "two", strategy)
    together = record.read(tmp_path / "two" / "record.json")
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert together.environment["processes"].startswith("2 (")
    assert together.curves["train_loss"] == pytest.approx(alone.curves["train_loss"], rel=1e-4)
    assert together.test_error == pytest.approx(alone.test_error, abs=2 / 1542)


def test_two_processes_resume_bit_for_bit(tmp_path):
    method = "SAM(rho=0.1)"
    two(method, tmp_path / "whole")
    assert two(method, tmp_path / "cut", stop=25) != 0
    assert checkpoint.read(tmp_path / "cut" / "checkpoint.pt")["step"] == 20
    two(method, tmp_path / "cut")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_must_be_shared_equally():
    place = replace(Hardware().open(), world=3)
    with pytest.raises(LabError, match="batch size 64 is no multiple of the 3 processes"):
        Session(run("SGD"), place)


def test_torchrun_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert Hardware()._launched() == (4, 3)
