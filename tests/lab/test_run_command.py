"""`steppe run`, `steppe doctor` and their Python face from end to end."""

import json

import pytest
import torch

from steppe.lab import checkpoint, doctor, metrics, notebook, record
from steppe.lab.settings import LabError

from . import formats
from .helpers import Process, steppe_cli

TINY = ["--epochs", "2", "--train-size", "256", "--batch-size", "64", "--model", "mlp-16"]


@pytest.fixture
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_here")
def test_run_from_end_to_end(tmp_path):
    first = steppe_cli("run", "SAM(rho=0.1)", *TINY)
    assert first.exit_code == 0, first.output
    assert "epoch 2/2, test error" in first.output
    folder = tmp_path / "runs" / "digits-sam-rho0.1-s0"
    assert {path.name for path in folder.iterdir()} == {"config.json", "runs", "weights", "metrics"}
    again = steppe_cli("run", "SAM(rho=0.1)", *TINY, "--json")
    found = json.loads(again.stdout)
    assert found["test_error"] == record.read(folder / "runs" / "sam-rho0.1-s0.json").test_error
    assert found["settings"]["epochs"] == 2
    assert "epochs was 2, now 3" in steppe_cli("run", "SAM(rho=0.1)", *TINY[2:], "--epochs", 3).output


@pytest.mark.usefixtures("_here")
def test_run_takes_every_setting(tmp_path):
    formats.cifar10(tmp_path / "data")
    options = ["--data", "cifar10", "--train-size", 60, "--model", "resnet18-w8-gn", "--epochs", 1, "--batch-size", 20]
    options += ["--optimizer", "adamw", "--lr", 0.001, "--warmup", 2, "--label-smoothing", 0.1, "--noise", 0.4]
    result = steppe_cli("run", "SAM(rho=0.05, m=10)", *options, "--precision", "bf16", "--out", "r", "--save-every", 1)
    assert result.exit_code == 0, result.output
    found = record.read(tmp_path / "r" / "runs" / "sam-rho0.05-m10-s0.json")
    assert found.base == (
        "AdamW(lr=0.001, betas=(0.9, 0.999), weight_decay=0.001), linear warm-up of 2 steps, cosine to 0"
    )
    assert (found.settings["noise"], found.settings["label_smoothing"], found.steps) == (0.4, 0.1, 3)
    assert found.environment["precision"] == "bf16"


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SAN"], "unknown method 'SAN'"),
        (["SGD", "--data", "cifar"], "unknown data 'cifar'"),
        (["SGD", "--data", "cifar10"], "no cifar10 in data/cifar10, data: unpack"),
        (["SGD", "--model", "net"], "unknown model 'net'"),
        (["SGD", "--model", "resnet18"], "model resnet18 takes images"),
        (["SGD", "--optimizer", "lion"], "optimizer must be one of sgd, adamw"),
        (["SGD", "--augment", "crop"], "augment crop is for images"),
        (["SGD", "--device", "tpu"], "device must be one of auto, cpu, cuda, mps"),
        (["SGD", "--precision", "fp8"], "precision must be one of fp32, bf16"),
        (["SGD", "--warmup", "-1"], "warmup must be a number of steps"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(tmp_path, arguments, message):
    result = steppe_cli("run", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_help_has_examples():
    assert "torchrun --nproc-per-node 8" in steppe_cli("run", "--help").output


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    saved = tmp_path / "r" / "checkpoints" / "sam-rho0.1-s0.pt"
    process = Process("run", "SAM(rho=0.1)", "--epochs", 3000, "--out", tmp_path / "r")
    process.until(saved.exists)
    process.interrupt()
    output, code = process.end()
    assert code == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert checkpoint.read(saved)["step"] >= 100


def test_doctor_finds_what_is_here_and_says_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_DATA", str(tmp_path))
    formats.svhn(tmp_path / "svhn")
    found = {(check["kind"], check["name"]): check for check in json.loads(steppe_cli("doctor", "--json").output)}
    assert found["data", "svhn"]["detail"] == str(tmp_path / "svhn")
    assert found["data", "svhn"]["found"]
    missing = found["data", "cifar10"]
    assert not missing["found"]
    assert str(tmp_path / "cifar10") in missing["detail"]
    assert "--data-dir" in missing["hint"]
    assert found["device", "cuda"]["found"] == torch.cuda.is_available()
    assert found["environment", "torch"]["detail"] == torch.__version__
    assert steppe_cli("doctor").exit_code == 0


def test_doctor_names_the_command_for_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("datasets", "torchvision") else "1.0")
    missing = next(check for check in doctor.checks() if check.name == "datasets")
    assert (missing.found, missing.hint) == (False, 'pip install "steppe[hub]"')


def test_the_python_face(tmp_path):
    small = {"train_size": 256, "batch_size": 64, "epochs": 2, "model": "mlp-16"}
    folder = notebook.compare(["SGD", "SAM(rho=0.1)"], seeds=2, folder=tmp_path / "c", workers=1, **small)
    rows = notebook.records(folder)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("SAM(rho=0.1)", 0),
        ("SAM(rho=0.1)", 1),
        ("SGD", 0),
        ("SGD", 1),
    ]
    assert rows[0]["passes"] == 4
    assert rows[0]["train_size"] == 256
    assert not any(isinstance(value, dict | list) for row in rows for value in row.values())
    assert len(notebook.curves(folder)) == 8
    one = notebook.run("SGD", folder=tmp_path / "r", **small)
    assert one.test_error == rows[2]["test_error"]
    assert notebook.records(tmp_path / "r") == [{**rows[2], "seconds": one.seconds}]
    with pytest.raises(LabError, match="no folder"):
        notebook.records(tmp_path / "nothing")


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard", reason="the optional package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "r"
    assert steppe_cli("run", "SAM(rho=0.1)", *TINY, "--tensorboard", "--out", out).exit_code == 0
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    points = [line for line in metrics.read(out / "metrics" / "sam-rho0.1-s0.jsonl") if "test_error" in line]
    shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars("test_error")]
    assert [(line["step"], line["test_error"]) for line in points] == shown
