"""Two processes through Lightning Fabric, on the CPU, against one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steppe.lab import checkpoint, files, single
from steppe.lab.errors import LabError
from steppe.lab.hardware import Hardware
from steppe.lab.record import Record
from steppe.lab.train import Session

from .helpers import TINY, run

pytest.importorskip("lightning_fabric", reason="the optional package lightning-fabric is not installed")

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from steppe.lab import single, spec
from steppe.lab.hardware import Hardware
from steppe.lab.runs import Run
from steppe.lab.settings import Settings
torch.set_num_threads(1)
settings = Settings(train_size=255, batch_size=64, epochs=14, model="mlp-16")
def stop(session, line):
    if session.step >= 25:
        os._exit(7)
for name in sys.argv[2:]:
    strategy = "fsdp" if name.startswith("fsdp") else "ddp"
    options = {"watch": stop} if name == "cut" else {}
    run = Run(spec.parse("WSAM(rho=0.1)" if name == "fsdp-wsam" else "SGD"), 0, settings)
    single.run(run, Path(sys.argv[1]) / name.removesuffix("-on"), Hardware(strategy=strategy), 10, **options)
"""
SETTINGS = replace(TINY, train_size=255, epochs=14)  # 42 steps; evaluations whose examples two do not share equally


def two(folder: Path, *names: str) -> int:
    """Run serially under torchrun, in one start of two processes."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [*command, folder / "script.py", folder, *names], capture_output=True, text=True, env=environment, timeout=300
    )
    assert ran.returncode == 0 or "cut" in names, ran.stderr
    return ran.returncode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Whole runs with DDP and FSDP2, and one that a process left at step 25."""
    folder = tmp_path_factory.mktemp("two")
    assert two(folder, "ddp", "fsdp", "fsdp-wsam", "cut") != 0
    return folder


def weights(folder):
    """The final weights of the one run in a folder."""
    return torch.load(next((folder / "weights").iterdir()), weights_only=True)


@pytest.mark.parametrize(("name", "method"), [("ddp", "SGD"), ("fsdp", "SGD"), ("fsdp-wsam", "WSAM(rho=0.1)")])
def test_two_processes_compute_what_one_computes(tmp_path, made, name, method):
    alone = single.run(run(method, settings=SETTINGS), tmp_path / "one")
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
    process = replace(Hardware().open(), world=3)
    with pytest.raises(LabError, match="batch size 64 is no multiple of the 3 processes"):
        Session(run("SGD"), process)


def test_torchrun_says_how_many_processes_there_are(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert Hardware()._launched() == (4, 3)
