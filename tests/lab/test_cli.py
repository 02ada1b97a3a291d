"""The command line from end to end, interruptions included."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import steppe
from steppe import cli
from steppe.lab import compare as pool
from steppe.lab import record, runs
from steppe.lab.commands.group import app
from steppe.lab.train import train

from .helpers import TINY as SETTINGS
from .helpers import run, trained, write_images

TINY = ["--epochs", "2", "--train-size", "256", "--batch-size", "64", "--seeds", "2"]


def steppe_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], terminal_width=200)


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
        (["--noise", "2"], "noise must be a share between 0 and 1"),
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


class Ended:
    """A view that notes how runs end."""

    def __init__(self):
        self.results = {}

    def step(self, run, step, steps):
        assert 0 <= step <= steps

    def done(self, run, result):
        self.results[run] = result


def test_a_run_that_raises_in_its_process_does_not_hold_up_the_others(tmp_path):
    bad, good = run("SGD", settings=replace(SETTINGS, model="resnet")), run("SGD", settings=SETTINGS)
    view = Ended()
    failures = pool.compare(tmp_path, [bad, good], 1, view)
    assert failures == [view.results[bad]]
    assert failures[0].reason.startswith("LabError: unknown model 'resnet'")
    assert "Traceback" in failures[0].details
    assert view.results[good] == record.read(runs.path_of(tmp_path, good))


def test_failed_runs_are_reported_with_method_and_seed(tmp_path, monkeypatch):
    def all_fail(folder, runs, workers, view, hardware):
        failures = [pool.Failure(run, "ValueError: [bad]", "the traceback") for run in runs]
        for failure in failures:
            view.done(failure.run, failure)
        return failures

    monkeypatch.setattr(pool, "compare", all_fail)
    result = steppe_cli("compare", *TINY, "--method", "SGD", "--out", tmp_path / "c")
    assert result.exit_code == 1
    assert "SGD seed 1 failed: ValueError: [bad]" in result.output
    assert "the traceback" in result.output
    assert not (tmp_path / "c" / "runs").exists()


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(SystemExit, match=r'needs plotly: pip install "steppe\[lab\]"'):
        cli.main()


class Process:
    """`steppe compare` in a process group of its own."""

    METHODS = ("--method", "SGD", "--method", "SAM(rho=0.1)")
    SIZE = ("--epochs", "120", "--train-size", "600", "--seeds", "2", "--workers", "1")

    def __init__(self, out):
        self.out = out
        command = [sys.executable, "-c", "from steppe.cli import main; main()", "compare", *self.METHODS, *self.SIZE]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # a shell's background job hands down an ignored Ctrl-C
        heard = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        self.process = subprocess.Popen([*command, "--out", out], **heard, **pipes)

    def until_runs(self, count):
        deadline = time.monotonic() + 60
        while len(self.whole()) < count:
            assert time.monotonic() < deadline, "no run finished in time"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.01)

    def whole(self):
        found = []
        for path in (self.out / "runs").glob("*.json"):
            try:
                found.append(record.read(path))
            except ValueError:
                continue
        return found

    def end(self):
        """The output and exit code; returns only when every process that could write to the pipe is gone."""
        return self.process.communicate(timeout=60)[0], self.process.returncode


def test_killed_then_interrupted_then_continued_is_as_if_nothing_had_happened(tmp_path):
    out = tmp_path / "c"
    killed = Process(out)
    killed.until_runs(1)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()  # its worker leaves with it
    kept = killed.whole()
    assert 1 <= len(kept) < 4
    (out / "runs" / ".sam-rho0.1-s1.json.77.tmp").write_text('{"format": 1, "meth')
    (out / "runs" / "sam-rho0.1-s1.json").write_text(json.dumps({"format": 1, "method": "SAM(rho=0.1)"})[:-9])

    stopped = Process(out)
    stopped.until_runs(len(kept) + 1)
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C, which reaches the workers too
    output, code = stopped.end()
    assert code == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output

    last = Process(out)
    output, code = last.end()
    assert code == 0, output
    plan = runs.read_plan(out)
    records, problems = runs.finished(out, plan)
    assert (len(records), problems) == (4, [])
    assert not list(out.rglob("*.tmp"))
    for each, found in records.items():
        assert found.curves == train(each).curves


def test_the_core_and_the_command_line_import_nothing_heavy():
    code = "import sys, steppe.cli; print([n for n in sys.modules if n in ('typer', 'plotly', 'scipy', 'steppe.lab')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
