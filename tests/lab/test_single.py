"""A run in a directory: resumed bit for bit, whatever stopped it."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from steppe.lab import checkpoint, files, metrics, report, runs, single
from steppe.lab.errors import LabError
from steppe.lab.hardware import Hardware
from steppe.lab.record import Record
from steppe.lab.train import Session, train
from tests.processes import Forked

from .helpers import TINY, run

STATEFUL = ("SGD", "AdamW", "SAM(rho=0.1, m=16)", "LookSAM(k=3)", "FSAM", "ESAM", "RWSAM(rho=0.1)", "NSAM")


class Stopped(Exception):
    pass


def stop_at(step):
    def watch(session, line):
        if session.step >= step:
            raise Stopped

    return watch


def path(folder, asked, kind="runs"):
    return runs.path_of(folder, asked, kind)


def weights(folder, asked):
    return torch.load(path(folder, asked, "weights"), weights_only=True)


def steps(folder, asked):
    """The lines of metrics, without their times."""
    lines = metrics.read(path(folder, asked, "metrics"))
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def until(session, step):
    for _ in session.fit():
        if session.step == step:
            break
    return session


@pytest.mark.parametrize("text", STATEFUL)
def test_a_session_goes_on_bit_for_bit_from_any_step(text):
    asked = run(text, settings=replace(TINY, warmup=3, epochs=2))  # 8 steps, evaluated after 4 and 8
    whole, state = until(Session(asked), 8), until(Session(asked), 5).state()
    second = Session(asked)
    torch.manual_seed(99)  # ESAM draws from the global stream
    second.restore(state)
    until(second, 8)
    assert second.step == 8
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert whole.schedule.get_last_lr() == second.schedule.get_last_lr()
    assert (whole.meter.forwards, whole.meter.backwards) == (second.meter.forwards, second.meter.backwards)


def test_a_stopped_run_continues_as_if_nothing_had_happened(tmp_path):
    asked = run("ESAM(rho=0.1)", settings=replace(TINY, epochs=20))  # 80 steps; draws random masks
    whole = single.run(asked, tmp_path / "whole", save_every=10)
    saved = path(tmp_path / "cut", asked, "checkpoints")
    with pytest.raises(Stopped):
        single.run(asked, tmp_path / "cut", save_every=7, watch=stop_at(40))
    assert checkpoint.read(saved)["step"] == 35
    torch.rand(3)
    cut = single.run(asked, tmp_path / "cut", save_every=7)
    assert cut.curves == whole.curves == train(asked).curves
    assert same(weights(tmp_path / "whole", asked), weights(tmp_path / "cut", asked))
    assert (cut.forwards, cut.backwards) == (whole.forwards, whole.backwards)
    assert steps(tmp_path / "cut", asked) == steps(tmp_path / "whole", asked)
    assert not saved.exists()
    assert single.run(asked, tmp_path / "cut", watch=stop_at(0)) == cut  # finished: nothing is trained again


def run_until_sync(asked, folder, deadly):
    """Train until a file has been half written, and be killed there."""
    torch.set_num_threads(1)
    sync, count = os.fsync, 0

    def fsync(handle):
        nonlocal count
        count += 1
        if count == deadly:
            os.truncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = fsync
    single.run(asked, folder, save_every=10)


def test_kill_9_in_the_middle_of_writing_a_checkpoint(tmp_path):
    asked = run("SAM(rho=0.1, m=16)", settings=replace(TINY, epochs=30))
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    # two syncs a file, content and folder: config.json, metrics.jsonl, then checkpoints
    for deadly in (11, 9):
        output, code = Forked(run_until_sync, asked, cut, deadly).end()
        assert code == -signal.SIGKILL, output
    assert list((cut / "checkpoints").glob(".*.tmp"))  # half a file
    assert 0 < checkpoint.read(path(cut, asked, "checkpoints"))["step"] < 120
    with path(cut, asked, "metrics").open("a") as file:
        file.write('{"step": 110, "lo')  # and half a line
    single.run(asked, cut, save_every=10)
    single.run(asked, whole)
    assert same(weights(whole, asked), weights(cut, asked))
    assert steps(cut, asked) == steps(whole, asked)
    assert not list(cut.rglob(".*"))


def test_every_global_stream_is_restored():
    import random

    import numpy as np

    def draw():
        return torch.rand(2).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn()

    np.random.randn()  # leaves a second gaussian waiting
    state = checkpoint.random_state()
    first = draw()
    assert draw() != first
    checkpoint.set_random_state(state)
    assert draw() == first


def test_metrics_say_what_happened(tmp_path):
    asked = run("SAM(rho=0.1)", settings=replace(TINY, epochs=10))
    found = single.run(asked, tmp_path / "r")
    lines = steps(tmp_path / "r", asked)
    points, losses = ([line for line in lines if key in line] for key in ("test_error", "loss"))
    assert [line["epoch"] for line in points] == list(range(1, 11))
    assert [line["step"] for line in losses] == [20, 40]
    assert losses[0]["rho"] == 0.1
    assert losses[1]["loss"] < losses[0]["loss"]
    assert files.load(path(tmp_path / "r", asked), Record).test_error == found.test_error == points[-1]["test_error"]


def test_a_run_is_a_directory_with_one_run(tmp_path):
    asked = run("SGD", 3, replace(TINY, epochs=1))
    found = single.run(asked, tmp_path)
    assert report.read(tmp_path).records == {asked: found}
    assert train(asked).curves == found.curves


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    folder = tmp_path / "r"
    asked = run("SGD", settings=replace(TINY, epochs=1))
    single.run(asked, folder)
    with pytest.raises(LabError, match=r"seed was 0, now 1; epochs was 1, now 2\. Choose another --out"):
        single.run(run("SGD", 1, replace(TINY, epochs=2)), folder)
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(LabError, match="holds no runs"):
        single.run(asked, other)
    assert os.listdir(other) == ["letter.txt"]


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"no zip" * 9])
def test_a_damaged_checkpoint_is_told(tmp_path, damage):
    asked = run("SGD", settings=replace(TINY, epochs=6))
    with pytest.raises(Stopped):
        single.run(asked, tmp_path / "r", save_every=10, watch=stop_at(20))
    saved = path(tmp_path / "r", asked, "checkpoints")
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(LabError, match=r"sgd-s0\.pt is damaged .*; delete it to start the run again"):
        single.run(asked, tmp_path / "r")
    saved.unlink()
    assert single.run(asked, tmp_path / "r").epochs == 6


def test_bf16_trains_beside_fp32():
    asked = run("SAM(rho=0.1)")
    full, half = train(asked), train(asked, hardware=Hardware(precision="bf16"))
    assert half.environment["precision"] == "bf16"
    assert half.curves["train_loss"] != full.curves["train_loss"]
    assert half.curves["train_loss"] == pytest.approx(full.curves["train_loss"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, mps, not 'gpu'"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16"),
        ({"strategy": "dp"}, "strategy must be one of ddp, fsdp"),
        ({"devices": 0}, "devices must be a positive integer"),
    ],
)
def test_hardware_is_checked(options, message):
    with pytest.raises(LabError, match=message):
        Hardware(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_told():
    with pytest.raises(LabError, match="device cuda is missing: "):
        Hardware(device="cuda").open()
    assert Hardware(device="auto").open().device.type in ("cpu", "mps")


def test_auto_is_an_accelerator_for_all_but_an_mlp(monkeypatch):
    monkeypatch.setattr("steppe.lab.hardware.found", lambda: ["cuda", "cpu"])
    assert [Hardware("auto").chosen(model).device for model in ("mlp-64", "cnn-8", "my:net")] == ["cpu", "cuda", "cuda"]
    assert Hardware("mps").chosen("mlp-64").device == "mps"
