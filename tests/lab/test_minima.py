import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from steppe.lab import files, minima, report, runs, tasks
from steppe.lab.commands.group import app
from steppe.lab.compare import compare
from steppe.lab.errors import LabError
from steppe.lab.record import Record
from steppe.lab.train import Session, initial_model
from steppe.measure import Hessian, Problem, eigenpairs

from .helpers import TINY, run, trained

METHODS = ("SGD", "SAM(rho=0.2)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small comparison, of a net small enough to measure in a moment."""
    trained(tmp_path, *METHODS, seeds=1)
    monkeypatch.setattr(minima, "STEPS", (-1.0, 0.0, 1.0))
    return tmp_path


def weights_of(folder, one):
    return runs.path_of(folder, one, "weights")


def command(folder):
    return CliRunner().invoke(app, ["measure", str(folder)])


def test_the_weights_kept_are_the_final_ones(folder):
    one = run("SGD")
    task = tasks.load(TINY, 0)
    ended = files.load(runs.path_of(folder, one), Record)
    model = minima.trained(folder, one, ended, task)
    session = Session(one)
    assert sum(session.fit()) == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), session.model.parameters(), strict=True))
    assert not list((folder / "weights").glob(".*"))


def test_weights_of_another_run_are_refused(folder):
    one, task = run("SGD"), tasks.load(TINY, 0)
    ended = files.load(runs.path_of(folder, one), Record)
    torch.save(initial_model(one, task).state_dict(), weights_of(folder, one))
    with pytest.raises(LabError, match="does not belong to its record"):
        minima.trained(folder, one, ended, task)
    weights_of(folder, one).unlink()
    with pytest.raises(LabError, match="before weights were kept"):
        minima.trained(folder, one, ended, task)


def test_compare_keeps_weights(tmp_path):
    one = run("SGD")
    assert not compare(tmp_path, runs.Plan.alone(one), 1, console=Console(quiet=True))
    assert weights_of(tmp_path, one).exists()


def test_the_command_measures_every_run_once_and_reports(folder):
    trained(folder, *METHODS)
    out = command(folder)
    assert out.exit_code == 0, out.output
    assert "4 runs to measure, 0 already measured" in out.output
    assert "SGD seed 0: loss" in out.output
    again = command(folder)
    assert "0 runs to measure, 4 already measured" in again.output
    page, text = (folder / "report.html").read_text(), (folder / "summary.md").read_text()
    for word in ("Minima", "top eigenvalue", "m-sharpness", "Loss around the minima"):
        assert word in page
    assert "## Minima" in text
    assert "baseline" in text


def test_what_is_recorded_is_the_minimum(folder):
    one, task = run("SAM(rho=0.2)"), tasks.load(TINY, 0)
    ended = files.load(runs.path_of(folder, one), Record)
    found = minima.measured(folder, one, ended)
    assert minima.read(folder, one) == found
    model = minima.trained(folder, one, ended, task)
    criterion = torch.nn.CrossEntropyLoss(reduction="none")
    H = Hessian(Problem(model, criterion, (task.inputs, task.labels)))
    assert found.minimum.top == pytest.approx(eigenpairs(H, tol=1e-4).value, rel=1e-3)
    assert found.minimum.loss == pytest.approx(ended.train_loss, rel=1e-4)
    assert found.minimum.error == pytest.approx(ended.train_error)
    assert found.slice["loss"][1] == pytest.approx(ended.train_loss, rel=1e-4)
    assert found.slice["loss"][0] > ended.train_loss
    assert sum(found.spectrum["share"]) == pytest.approx(1)
    assert max(found.spectrum["node"]) == pytest.approx(found.minimum.top, rel=0.02)


def test_an_interrupt_keeps_what_is_done(folder, monkeypatch):
    measured, seen = minima.measured, []

    def stop_at_second(*arguments):
        if seen:
            raise KeyboardInterrupt
        seen.append(arguments)
        return measured(*arguments)

    monkeypatch.setattr(minima, "measured", stop_at_second)
    out = command(folder)
    assert out.exit_code == 130
    assert "kept" in out.output
    assert len(list((folder / "minima").glob("*.json"))) == 1
    monkeypatch.setattr(minima, "measured", measured)
    assert "1 runs to measure, 1 already measured" in command(folder).output


def test_a_run_that_cannot_be_measured_does_not_stop_the_others(folder):
    weights_of(folder, run("SGD")).unlink()
    out = command(folder)
    assert out.exit_code == 1
    assert "SGD seed 0" in out.output
    assert len(list((folder / "minima").glob("*.json"))) == 1
    assert "1 finished runs are not measured" in (folder / "summary.md").read_text()


def test_damaged_records_are_told(folder):
    path = runs.path_of(folder, run("SGD"), "minima")
    path.parent.mkdir()
    for damage in ("{", json.dumps({"format": 1, "method": "SGD"})):
        path.write_text(damage)
        with pytest.raises(LabError, match="is damaged"):
            minima.read(folder, run("SGD"))
    other = run("SAM(rho=0.2)")
    minima.measured(folder, other, files.load(runs.path_of(folder, other), Record))
    report.write(folder)
    assert "is damaged" in (folder / "summary.md").read_text()


def test_a_directory_without_runs_is_an_error(tmp_path):
    assert command(tmp_path).exit_code == 2
    runs.open_for(tmp_path / "empty", runs.Plan(TINY, (run("SGD").method,), 1))
    out = command(tmp_path / "empty")
    assert "holds no finished run" in out.output


def test_a_run_that_has_diverged_is_told_and_one_of_few_examples_is_measured(tmp_path):
    few = replace(TINY, train_size=100, batch_size=50)  # one subset of m-sharpness, whose error is unknown
    trained(tmp_path / "few", "SGD", seeds=1, settings=few)
    assert command(tmp_path / "few").exit_code == 0
    assert minima.read(tmp_path / "few", run("SGD", settings=few)).minimum.sharpness_error is None
    diverged = replace(TINY, lr=1e6)
    trained(tmp_path / "diverged", "SGD", seeds=1, settings=diverged)
    out = command(tmp_path / "diverged")
    assert out.exit_code == 1
    assert "SGD seed 0: its training loss is not finite" in out.output
