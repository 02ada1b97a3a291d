"""A worker that is killed under ``torchrun --max-restarts``: the run comes back from its checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.processes import Forked

pytest.importorskip("lightning_fabric", reason="the optional package lightning-fabric is not installed")
pytest.importorskip("sklearn")


def train(folder: Path) -> None:
    from steppe.lab import single, spec
    from steppe.lab.hardware import Hardware
    from steppe.lab.runs import Run
    from steppe.lab.settings import Settings

    torch.set_num_threads(1)
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def watch(session, line) -> None:  # the first process calls it
        with (folder / f"steps-{attempt}").open("a") as seen:
            seen.write(f"{session.step} ")
        if attempt == "0" and session.step >= 25:
            os.kill(os.getpid(), signal.SIGKILL)

    run = Run(spec.parse("FSAM(rho=0.05)"), 0, Settings(train_size=256, batch_size=64, epochs=14, model="mlp-16"))
    single.run(run, folder / "killed", Hardware(), 10, watch=watch)
    single.run(run, folder / "whole", Hardware())


def launch(folder: Path) -> None:
    """Do what ``torchrun --standalone --nproc-per-node 2 --max-restarts 1`` does, by processes that are forked."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    config = LaunchConfig(1, 1, 2, max_restarts=1, start_method="fork", **where)
    elastic_launch(config, train)(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(next((folder / "weights").iterdir()), weights_only=True)


def test_a_killed_worker_comes_back_from_the_checkpoint(tmp_path: Path) -> None:
    """Every attempt gets a store of its own: in a shared one, gloo may read the addresses of the attempt before."""
    output, code = Forked(launch, tmp_path).end(300)
    assert code == 0, output
    steps = [(tmp_path / f"steps-{attempt}").read_text().split() for attempt in (0, 1)]
    assert int(steps[0][-1]) >= 25
    assert int(steps[1][0]) > 20  # step 20 has the last checkpoint before
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
