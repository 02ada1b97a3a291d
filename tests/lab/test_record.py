import json
from dataclasses import replace

import pytest

from steppe.lab import files, report, runs, spec
from steppe.lab.errors import LabError
from steppe.lab.record import Record
from steppe.lab.runs import Plan, open_for, path_of
from steppe.lab.train import train

from .helpers import TINY, run, trained


@pytest.fixture(scope="module")
def finished():
    return train(run("SAM(rho=0.1)"))


def test_round_trip(tmp_path, finished):
    path = tmp_path / "runs" / "a.json"
    files.save(path, finished)
    assert files.load(path, Record) == finished
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"x": float("nan")})
    assert files.read_json(path) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def damaged(**changes):
    return lambda data: json.dumps(data | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: json.dumps(data)[:-1],
        lambda data: json.dumps(data)[: len(json.dumps(data)) // 2],
        lambda data: "",
        lambda data: "[]",
        lambda data: "\0" * 400,
        lambda data: json.dumps({key: data[key] for key in data if key != "test_error"}),
        damaged(extra=1),
        damaged(test_error=None),
        damaged(test_error="0.1"),
        damaged(steps=0),
        damaged(curves={}),
        damaged(curves=3),
        damaged(method=7),
    ],
)
def test_a_damaged_file_is_no_finished_run(tmp_path, finished, damage):
    plan = open_for(tmp_path, Plan(TINY, (spec.parse("SAM(rho=0.1)"),), 1))
    path = path_of(tmp_path, plan.runs()[0])
    files.save(path, finished)
    assert len(runs.finished(tmp_path, plan)[0]) == 1
    path.write_text(damage(json.loads(path.read_text())))
    records, problems = runs.finished(tmp_path, plan)
    assert records == {}
    assert problems[0].startswith("sam-rho0.1-s0.json is ignored")


def test_a_comparison_of_data_that_only_older_versions_read_is_reported(tmp_path, finished):
    settings = replace(TINY, data="svhn")
    plan = open_for(tmp_path, plan_of("SAM(rho=0.1)", settings=settings))
    files.save(path_of(tmp_path, plan.runs()[0]), replace(finished, settings=settings.to_dict()))
    assert len(report.write(tmp_path).records) == 1


def test_a_newer_format_is_no_damage(tmp_path, finished):
    plan = runs.open_for(tmp_path, plan_of("SAM(rho=0.1)"))
    path = runs.path_of(tmp_path, plan.runs()[0])
    files.save(path, finished)
    path.write_text(damaged(format=2)(json.loads(path.read_text())))
    with pytest.raises(LabError, match=r"format 2, of a newer steppe; this one reads format 1\. Update steppe"):
        runs.finished(tmp_path, plan)


def test_another_runs_record_is_not_taken(tmp_path, finished):
    plan = open_for(tmp_path, Plan(TINY, (spec.parse("SAM(rho=0.1)"),), 2))
    files.save(path_of(tmp_path, plan.runs()[1]), finished)  # seed 0 in the file of seed 1
    assert runs.finished(tmp_path, plan)[0] == {}


def test_leftover_temporary_files_are_cleaned(tmp_path):
    plan = trained(tmp_path, "SGD", seeds=1)
    for leftover in (tmp_path / "runs" / ".sgd-s0.json.123.tmp", tmp_path / ".config.json.9.tmp"):
        leftover.write_text('{"half')
    open_for(tmp_path, plan)
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(runs.finished(tmp_path, plan)[0]) == 1


def plan_of(*methods, seeds=1, settings=TINY, baseline=None):
    return Plan(settings, tuple(map(spec.parse, methods)), seeds, baseline and spec.parse(baseline))


def test_methods_and_seeds_may_be_added(tmp_path):
    open_for(tmp_path, plan_of("SGD", "SAM", seeds=3, baseline="SAM"))
    whole = open_for(tmp_path, plan_of("ASAM", "SGD", seeds=2))
    assert whole == runs.read_plan(tmp_path) == plan_of("SGD", "SAM", "ASAM", seeds=3, baseline="SAM")


def test_a_search_alone_can_be_reported_and_binds_no_comparison(tmp_path):
    points = [{"values": {"lr": lr}, "errors": [lr], "error": lr, "dropped": False} for lr in (0.1, 0.2)]
    stage = {"name": "base", "method": "SGD", "chosen": {"lr": 0.1}, "points": points}
    files.write_json(tmp_path / runs.SEARCH, {"stages": [stage], "seeds": 1})
    runs.open_for(tmp_path, plan_of("SGD", seeds=0))
    report.write(tmp_path)
    assert "Search: base" in (tmp_path / "report.html").read_text()
    other = plan_of("SAM", settings=replace(TINY, lr=0.2))
    assert runs.open_for(tmp_path, other) == other
    assert runs.read_plan(tmp_path).settings == other.settings


def test_other_settings_are_refused_and_named(tmp_path):
    open_for(tmp_path, plan_of("SGD"))
    other = plan_of("SGD", settings=replace(TINY, epochs=5, lr=0.1))
    with pytest.raises(LabError, match=r"other runs: epochs was 3, now 5; lr was 0\.05, now 0\.1"):
        open_for(tmp_path, other)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(LabError, match="holds no runs"):
        open_for(tmp_path, plan_of("SGD"))
    with pytest.raises(LabError, match="holds no runs"):
        runs.read_plan(tmp_path)


def test_a_directory_is_for_one_command_at_a_time(tmp_path):
    with files.hold(tmp_path), pytest.raises(LabError, match="another command works in"), files.hold(tmp_path):
        pass
    with files.hold(tmp_path / "new"):  # what ends without a file leaves no folder
        pass
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"cannot write .*x\.json: "):
        files.write(tmp_path / "file" / "x.json", "")


def test_a_damaged_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 1, "settings": {}')
    with pytest.raises(LabError, match=r"config\.json is damaged"):
        runs.read_plan(tmp_path)


def test_the_baseline_must_be_a_method(tmp_path):
    with pytest.raises(LabError, match="baseline USAM is none of the methods: SGD, SAM"):
        open_for(tmp_path, plan_of("SGD", "SAM", baseline="USAM"))
    assert not list(tmp_path.iterdir())
