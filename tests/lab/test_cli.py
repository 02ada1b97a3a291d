"""The command line and its Python face from end to end, interruptions included."""

import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from inspect import cleandoc

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import steppe
from steppe import cli
from steppe.lab import checkpoint, doctor, files, notebook, runs, spec
from steppe.lab import compare as pool
from steppe.lab.commands import COMMANDS
from steppe.lab.commands.group import app
from steppe.lab.compare import compare
from steppe.lab.errors import LabError
from steppe.lab.record import Record
from steppe.lab.runs import Plan
from steppe.lab.train import train

from . import formats
from .helpers import TINY as SETTINGS
from .helpers import Process, steppe_cli, trained

TINY = ["--epochs", "2", "--train-size", "256", "--batch-size", "64", "--seeds", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_version():
    assert steppe_cli("--version").output == f"steppe {steppe.__version__}\n"


def test_compare_from_end_to_end_then_continue(tmp_path):
    out = tmp_path / "c"
    methods = ["--method", "SGD", "--method", "SAM(rho=0.1, m=32)"]
    first = steppe_cli("compare", "--fixed", *TINY, *methods, "--workers", 2, "--out", out)
    assert first.exit_code == 0, first.output
    names = ["sam-rho0.1-m32-s0.json", "sam-rho0.1-m32-s1.json", "sgd-s0.json", "sgd-s1.json"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == names
    assert "Holm-corrected" in first.output
    assert "SAM(rho=0.1, m=32)" in (out / "summary.md").read_text()
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")

    written = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    again = steppe_cli("compare", "--fixed", *TINY, *methods, "--out", out)
    assert "0 runs to do, 4 already in" in again.output
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == written
    assert "epochs was 2, now 9" in steppe_cli("compare", "--fixed", *TINY, "--epochs", 9, "--out", out).output

    for each, kept in runs.finished(out, runs.read_plan(out))[0].items():
        assert train(each).curves == kept.curves  # a worker process computes what this one does


def test_report_command(tmp_path):
    trained(tmp_path, "SGD", "SAM(rho=0.1)")
    result = steppe_cli("report", tmp_path, "--baseline", "SAM(rho=0.1)")
    assert result.exit_code == 0
    assert (tmp_path / "report.html").exists()


def test_a_run_that_raises_in_its_process_does_not_hold_up_the_others(tmp_path, monkeypatch):
    methods = tuple(map(spec.parse, ("NSAM", "SGD")))
    plan = Plan(replace(SETTINGS, epochs=1), methods, 1)
    bad, good = plan.runs()
    runs.open_for(tmp_path, plan)
    (tmp_path / "weights" / f"{bad.name}.pt").mkdir(parents=True)  # where its weights would go
    (failure,) = compare(tmp_path, plan, 1, console=Console(quiet=True))
    assert failure.run == bad
    assert failure.reason.startswith("cannot write")
    assert "Traceback" in failure.details
    assert list(runs.finished(tmp_path, plan)[0]) == [good]


def test_failed_runs_are_reported_with_method_and_seed(tmp_path, monkeypatch):
    def all_fail(folder, plan, *rest):
        return [pool.Failure(run, "ValueError: [bad]", "the traceback") for run in plan.runs()]

    runs.open_for(tmp_path, Plan(SETTINGS, (spec.parse("SGD"),), 2))
    monkeypatch.setattr(pool, "compare", all_fail)
    result = steppe_cli("compare", "--fixed", *TINY, "--method", "SGD", "--out", tmp_path)
    assert result.exit_code == 1
    assert result.stderr == "SGD seed 0 failed: ValueError: [bad] (and 1 more failed)\n"
    assert "the traceback" not in result.output
    monkeypatch.setenv("STEPPE_DEBUG", "1")
    assert "the traceback" in steppe_cli("compare", "--fixed", *TINY, "--method", "SGD", "--out", tmp_path).stderr


def test_two_comparisons_do_not_share_a_directory(tmp_path):
    with files.hold(tmp_path / "c"):
        result = steppe_cli("compare", "--fixed", *TINY, "--method", "SGD", "--out", tmp_path / "c")
    assert result.exit_code == 2
    assert "another command works in" in result.stderr


def test_a_missing_extra_is_named_and_help_and_version_need_none(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "jinja2" else object())
    needs = 'need jinja2; in a clone of steppe: pip install -e ".[lab]"'
    monkeypatch.setattr(sys, "argv", ["steppe", "compare"])
    with pytest.raises(SystemExit, match=re.escape(needs)):
        cli.main()
    for arguments, words in (([], needs), (["--help"], "  compare "), (["--version"], f"steppe {steppe.__version__}")):
        monkeypatch.setattr(sys, "argv", ["steppe", *arguments])
        cli.main()
        assert words in capsys.readouterr().out


def test_help_lists_every_command_and_imports_none():
    code = "import sys; from typer.testing import CliRunner; from steppe.lab.commands.group import app; "
    code += "print(CliRunner().invoke(app, ['--help']).output); from steppe.lab.commands import COMMANDS; "
    code += "print([module for module in (*dict(COMMANDS.values()), 'torch') if module in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("\n[]\n")
    assert all(f" {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_keeps_the_lines_of_its_examples(monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = CliRunner().invoke(app, [name, "--help"], prog_name="steppe").output
    assert f"steppe {name} [OPTIONS]" in shown
    text = cleandoc(getattr(import_module(COMMANDS[name][0]), name).__doc__)
    examples = [line for line in text.splitlines() if line.startswith("    ")]
    lines = [line.rstrip() for line in shown.splitlines()]
    for line in examples:
        assert any(one.endswith(line) for one in lines), line
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith("    "):
            assert " ".join(paragraph.split()) in " ".join(shown.split())
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)


class Comparison(Process):
    """`steppe compare` in a process group of its own."""

    METHODS = ("--method", "SGD", "--method", "SAM(rho=0.1)")
    SIZE = ("--epochs", "60", "--train-size", "600", "--seeds", "2", "--workers", "1")

    def __init__(self, out):
        self.out = out
        super().__init__("compare", "--fixed", *self.METHODS, *self.SIZE, "--out", out)

    def until_runs(self, count):
        self.until(lambda: len(self.whole()) >= count)

    def whole(self):
        found = []
        for path in (self.out / "runs").glob("*.json"):
            with suppress(ValueError):
                found.append(files.load(path, Record))
        return found


def test_killed_then_interrupted_then_continued_is_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "c"
    killed = Comparison(out)
    killed.until_runs(1)
    killed.kill()
    killed.end()
    kept = killed.whole()
    assert 1 <= len(kept) < 4
    (out / "runs" / ".sam-rho0.1-s1.json.77.tmp").write_text('{"format": 1, "meth')
    (out / "runs" / "sam-rho0.1-s1.json").write_text(json.dumps({"format": 1, "method": "SAM(rho=0.1)"})[:-9])

    stopped = Comparison(out)
    stopped.until_runs(len(kept) + 1)
    stopped.interrupt()
    output, code = stopped.end()
    assert code == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output

    last = Comparison(out)
    output, code = last.end()
    assert code == 0, output
    plan = runs.read_plan(out)
    records, problems = runs.finished(out, plan)
    assert (len(records), problems) == (4, [])
    assert not list(out.rglob("*.tmp"))
    for each, found in records.items():
        assert found.curves == train(each).curves


def test_the_core_and_the_command_line_import_nothing_heavy():
    code = "import sys, steppe.cli; "
    code += "print([n for n in sys.modules if n in ('torch', 'typer', 'rich', 'scipy', 'steppe.lab.settings')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


# ---- steppe run, doctor, and the Python face


def test_run_from_end_to_end(here):
    first = steppe_cli("run", "SAM(rho=0.1)", *TINY[:-2], "--model", "mlp-16")
    assert first.exit_code == 0, first.output
    assert "epoch 2/2, test error" in first.output
    folder = here / "runs" / "digits-sam-rho0.1-s0"
    assert {path.name for path in folder.iterdir()} == {"config.json", "runs", "weights", "metrics"}
    again = steppe_cli("run", "SAM(rho=0.1)", *TINY[:-2], "--model", "mlp-16", "--json")
    found = json.loads(again.stdout)
    assert found["test_error"] == files.load(folder / "runs" / "sam-rho0.1-s0.json", Record).test_error
    assert found["settings"]["epochs"] == 2
    assert (
        "epochs was 2, now 3"
        in steppe_cli("run", "SAM(rho=0.1)", *TINY[2:-2], "--model", "mlp-16", "--epochs", 3).output
    )


def test_run_takes_every_setting(here):
    formats.cifar10(here / "data")
    options = ["--data", "cifar10", "--train-size", 60, "--model", "resnet18-w8-gn", "--epochs", 1, "--batch-size", 20]
    options += ["--optimizer", "adamw", "--lr", 0.001, "--warmup", 2, "--label-smoothing", 0.1, "--noise", 0.4]
    result = steppe_cli("run", "SAM(rho=0.05, m=10)", *options, "--precision", "bf16", "--out", "r", "--save-every", 1)
    assert result.exit_code == 0, result.output
    found = files.load(here / "r" / "runs" / "sam-rho0.05-m10-s0.json", Record)
    assert found.base == (
        "AdamW(lr=0.001, betas=(0.9, 0.999), weight_decay=0.001), linear warm-up of 2 steps, cosine to 0"
    )
    assert (found.settings["noise"], found.settings["label_smoothing"], found.steps) == (0.4, 0.1, 3)
    assert found.environment["precision"] == "bf16"


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
    formats.cifar100(tmp_path / "cifar100")
    found = {(check["kind"], check["name"]): check for check in json.loads(steppe_cli("doctor", "--json").output)}
    assert found["data", "cifar100"]["detail"] == str(tmp_path / "cifar100")
    assert found["data", "cifar100"]["found"]
    missing = found["data", "cifar10"]
    assert not missing["found"]
    assert str(tmp_path / "cifar10") in missing["detail"]
    assert "--data-dir" in missing["hint"]
    assert found["device", "cuda"]["found"] == torch.cuda.is_available()
    assert found["environment", "torch"]["detail"] == torch.__version__
    assert steppe_cli("doctor").exit_code == 0


def test_doctor_names_the_command_for_a_missing_package(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "lightning-fabric" else "1.0")
    missing = next(check for check in doctor.checks() if check.name == "lightning-fabric")
    assert (missing.found, missing.hint) == (False, 'in a clone of steppe: pip install -e ".[distributed]"')


def test_the_python_face(tmp_path):
    small = {"train_size": 256, "batch_size": 64, "epochs": 2, "model": "mlp-16"}
    folder = notebook.compare(["SGD", "SAM(rho=0.1)"], seeds=2, folder=tmp_path / "c", fixed=True, **small)
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
