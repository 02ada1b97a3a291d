"""A worker that is killed under ``torchrun --max-restarts``: the run comes back from its checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="the optional package lightning-fabric is not installed")
pytest.importorskip("sklearn")

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from steppe.lab import single, spec
from steppe.lab.hardware import Hardware
from steppe.lab.runs import Run
from steppe.lab.settings import Settings

torch.set_num_threads(1)
folder, attempt = Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"]

def watch(session, line):  # the first process calls it
    with (folder / f"steps-{attempt}").open("a") as seen:
        seen.write(f"{session.step} ")
    if attempt == "0" and session.step >= 25:
        os.kill(os.getpid(), signal.SIGKILL)

run = Run(spec.parse("FSAM(rho=0.05)"), 0, Settings(train_size=256, batch_size=64, epochs=14, model="mlp-16"))
single.run(run, folder / "killed", Hardware(), 10, watch=watch)
single.run(run, folder / "whole", Hardware())
"""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(next((folder / "weights").iterdir()), weights_only=True)


def test_a_killed_worker_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    """Every attempt gets a store of its own: in a shared one, gloo may read the addresses of the attempt before."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", script, tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    steps = [(tmp_path / f"steps-{attempt}").read_text().split() for attempt in (0, 1)]
    assert int(steps[0][-1]) >= 25
    assert int(steps[1][0]) > 20  # step 20 has the last checkpoint before
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
