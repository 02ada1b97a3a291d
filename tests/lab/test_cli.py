"""The command line from end to end, interruptions included."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
from rich.console import Console

import steppe
from steppe import cli
from steppe.lab import compare as pool
from steppe.lab import files, record, runs, spec
from steppe.lab.commands import COMMANDS
from steppe.lab.compare import compare
from steppe.lab.runs import Plan
from steppe.lab.train import train

from .helpers import TINY as SETTINGS
from .helpers import Process, steppe_cli, trained, write_images

TINY = ["--epochs", "2", "--train-size", "256", "--batch-size", "64", "--seeds", "2"]


def test_version():
    assert steppe_cli("--version").output == f"steppe {steppe.__version__}\n"


def test_compare_from_end_to_end_then_continue(tmp_path):
    out = tmp_path / "c"
    methods = ["--method", "SGD", "--method", "SAM(rho=0.1, m=32)"]
    first = steppe_cli("compare", *TINY, *methods, "--workers", 2, "--out", out)
    assert first.exit_code == 0, first.output
    names = ["sam-rho0.1-m32-s0.json", "sam-rho0.1-m32-s1.json", "sgd-s0.json", "sgd-s1.json"]
    assert sorted(path.name for path in (out / "runs").iterdir()) == names
    assert "Holm-corrected" in first.output
    assert "SAM(rho=0.1, m=32)" in (out / "summary.md").read_text()
    assert (out / "report.html").stat().st_size > 1e6

    written = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    again = steppe_cli("compare", *TINY, *methods, "--out", out)
    assert "0 runs to do, 4 already in" in again.output
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()} == written
    assert "epochs was 2, now 9" in steppe_cli("compare", *TINY, "--epochs", 9, "--out", out).output

    for each, kept in runs.finished(out, runs.read_plan(out))[0].items():
        assert train(each).curves == kept.curves  # a worker process computes what this one does


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "unknown data 'cifar'; choose from cifar10, cifar100, digits, fashion-mnist"),
        (["--method", "SAN"], "unknown method 'SAN'"),
        (["--method", "SAM(rho=-1)"], "rho must be"),
        (["--baseline", "ASAM"], "baseline ASAM is none of the methods"),
        (["--noise", "2"], "noise must be a number in [0, 1]"),
        (["--train-size", "1797"], "train-size 1797 exceeds the 1796 examples"),
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "no fashion-mnist in"),
        (["--data-dir", "nowhere"], "data-dir goes with --data fashion-mnist"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(tmp_path, arguments, message):
    result = steppe_cli("compare", *arguments, "--out", tmp_path / "c")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "c").exists()


def test_a_damaged_image_folder_is_told(tmp_path):
    folder = write_images(tmp_path / "d")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    result = steppe_cli(
        "compare", "--data", "fashion-mnist", "--data-dir", folder, "--train-size", "96", "--batch-size", 32
    )
    assert result.exit_code == 2
    assert "no t10k-labels-idx1-ubyte" in result.output


def test_report_command(tmp_path):
    trained(tmp_path, "SGD", "SAM(rho=0.1)")
    result = steppe_cli("report", tmp_path, "--baseline", "SAM(rho=0.1)")
    assert result.exit_code == 0
    assert (tmp_path / "report.html").exists()
    assert steppe_cli("report", tmp_path / "nothing").exit_code == 2


def test_a_run_that_raises_in_its_process_does_not_hold_up_the_others(tmp_path, monkeypatch):
    methods = tuple(map(spec.parse, ("NSAM", "SGD")))
    plan = Plan(replace(SETTINGS, epochs=1), methods, 1)
    bad, good = plan.runs()
    runs.open_for(tmp_path, plan)
    (tmp_path / "weights" / f"{bad.name}.pt").mkdir(parents=True)  # where its weights would go
    (failure,) = compare(tmp_path, plan, 1, console=Console(quiet=True))
    assert failure.run == bad
    assert failure.reason.startswith("LabError: cannot write")
    assert "Traceback" in failure.details
    assert list(runs.finished(tmp_path, plan)[0]) == [good]


def test_failed_runs_are_reported_with_method_and_seed(tmp_path, monkeypatch):
    def all_fail(folder, plan, *rest):
        return [pool.Failure(run, "ValueError: [bad]", "the traceback") for run in plan.runs()]

    runs.open_for(tmp_path, Plan(SETTINGS, (spec.parse("SGD"),), 2))
    monkeypatch.setattr(pool, "compare", all_fail)
    result = steppe_cli("compare", *TINY, "--method", "SGD", "--out", tmp_path)
    assert result.exit_code == 1
    assert "SGD seed 1 failed: ValueError: [bad]" in result.output
    assert "the traceback" in result.output


def test_two_comparisons_do_not_share_a_directory(tmp_path):
    with files.hold(tmp_path / "c"):
        result = steppe_cli("compare", *TINY, "--method", "SGD", "--out", tmp_path / "c")
    assert result.exit_code == 2
    assert "another command works in" in result.stderr


def test_a_missing_extra_is_named_and_help_and_version_need_none(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plotly" else object())
    needs = 'need plotly: pip install "steppe[lab]"'
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
    code += "print([module for module, _ in COMMANDS.values() if module in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("\n[]\n")
    assert all(f" {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    assert f"steppe {name} [OPTIONS]" in " ".join(steppe_cli(name, "--help").output.split())
    assert steppe_cli("nothing").exit_code == 2


class Comparison(Process):
    """`steppe compare` in a process group of its own."""

    METHODS = ("--method", "SGD", "--method", "SAM(rho=0.1)")
    SIZE = ("--epochs", "120", "--train-size", "600", "--seeds", "2", "--workers", "1")

    def __init__(self, out):
        self.out = out
        super().__init__("compare", *self.METHODS, *self.SIZE, "--out", out)

    def until_runs(self, count):
        self.until(lambda: len(self.whole()) >= count)

    def whole(self):
        found = []
        for path in (self.out / "runs").glob("*.json"):
            with suppress(ValueError):
                found.append(record.read(path))
        return found


def test_killed_then_interrupted_then_continued_is_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "c"
    killed = Comparison(out)
    killed.until_runs(1)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()  # its worker leaves with it
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
    code += "print([n for n in sys.modules if n in ('typer', 'rich', 'scipy', 'steppe.lab.settings')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
