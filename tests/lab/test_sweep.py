"""Searches: what is tried, that each point is trained once whatever dies, and that the test set stays out of it."""

import os
import sqlite3
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import OperationalError

from steppe.lab import data, tasks
from steppe.lab.errors import LabError
from steppe.lab.settings import Settings
from steppe.lab.sweep import space, study, work
from steppe.lab.sweep.space import Search, Stage
from steppe.lab.sweep.study import POINT, Grid, open_storage, shown
from steppe.lab.sweep.work import Worksite
from tests.processes import Forked

from .helpers import TINY, steppe_cli, write_images
from .sweep_worker import LRS, TWO_STAGES, result, search_two_stages

VALID = replace(TINY, validation=0.25, test_seed=0)
BASE = Stage("base", "SGD", {"lr": (0.05, 0.1), "weight_decay": (1e-4, 1e-3)})


@pytest.fixture
def storage(tmp_path):
    return open_storage(f"sqlite:///{tmp_path / 'study.db'}")


def place(folder, name="study"):
    return Worksite(f"sqlite:///{folder / name}.db", "s", folder / "search")


def untimed(found):
    """What a search found, without the seconds that it took."""
    values, stages = found
    return values, [stage | {"points": [point | {"seconds": None} for point in stage["points"]]} for stage in stages]


# ---- what is tried


def test_points_are_the_whole_grid_in_order():
    assert BASE.points() == [
        {"lr": 0.05, "weight_decay": 1e-4},
        {"lr": 0.05, "weight_decay": 1e-3},
        {"lr": 0.1, "weight_decay": 1e-4},
        {"lr": 0.1, "weight_decay": 1e-3},
    ]


def test_values_fill_holes_and_settings():
    values = {"rho": 0.2, "gamma": 0.9, "lr": 0.3}
    assert str(space.filled("WSAM(rho={rho}, gamma={gamma})", values)) == "WSAM(rho=0.2, gamma=0.9)"
    assert space.applied(TINY, values) == replace(TINY, lr=0.3)
    with pytest.raises(LabError, match=r"needs a value for alpha"):
        space.filled("GSAM(rho={rho}, alpha={alpha})", values)


def test_spaces_are_parsed_and_narrow_the_stages():
    assert space.parse("rho=0.05, 0.1,1") == ("rho", (0.05, 0.1, 1))
    (stage,) = space.narrowed((BASE,), {"lr": (0.3,)})
    assert stage.grid == {"lr": (0.3,), "weight_decay": (1e-4, 1e-3)}
    with pytest.raises(LabError, match="space 'rho' is not searched here; choose from lr, weight_decay"):
        space.narrowed((BASE,), {"rho": (1.0,)})


@pytest.mark.parametrize("text", ["rho", "rho=", "rho=a", "=1", "rho=1,,2", "rho=__import__('os')"])
def test_spaces_that_cannot_be_read(text):
    with pytest.raises(LabError, match="cannot read space"):
        space.parse(text)


def test_bad_values_are_found_before_anything_runs():
    with pytest.raises(LabError, match="gamma must be"):
        space.check(Search(VALID, (Stage("WSAM", "WSAM(gamma={gamma})", {"gamma": (0.5, 1.0)}),)))
    with pytest.raises(LabError, match="lr must be"):
        space.check(Search(VALID, (Stage("base", "SGD", {"lr": (0.1, -1.0)}),)))


# ---- the test set stays out


def test_a_search_needs_a_validation_split():
    with pytest.raises(LabError, match="needs a validation share"):
        Search(TINY, (BASE,))
    with pytest.raises(LabError, match="needs a test-seed"):
        Search(replace(TINY, validation=0.1), (BASE,))


def rows_of(part, whole):
    """The examples of `part` as row numbers of `whole`, found by their pixels."""
    numbers = {tuple(example): row for row, example in enumerate(whole.tolist())}
    return {numbers[tuple(example)] for example in part.tolist()}


def test_validation_examples_are_training_examples_and_never_test_examples():
    settings = replace(VALID, train_size=1000, noise=0.0)
    digits = data.read(settings).inputs
    tests = {seed: tasks.load(replace(settings, validation=0.0), seed).test_inputs for seed in range(3)}
    assert torch.equal(tests[0].argsort(0), tests[1].argsort(0))  # the same test set, whatever scaling training gives
    order = torch.randperm(1797, generator=tasks.stream(0, "split"))
    pool, reserved = set(order[:1000].tolist()), set(order[1000:].tolist())
    spread, mean = torch.std_mean(digits[order[:1000]])
    for seed in range(3):
        task = tasks.load(settings, seed)
        assert (len(task.labels), len(task.test_labels)) == (750, 250)
        fitted, held = (rows_of((part * spread + mean).round(), digits) for part in (task.inputs, task.test_inputs))
        assert fitted | held <= pool | reserved
        assert (fitted | held).isdisjoint(reserved)
        assert fitted.isdisjoint(held)


def test_a_search_does_not_change_with_the_test_set(tmp_path, monkeypatch):
    asked = Search(VALID, (Stage("base", "SGD", {"lr": (0.05, 0.2)}),))
    honest = work.search(asked, place(tmp_path, "a"))
    pool = data.read(VALID)
    reserved = torch.randperm(len(pool.labels), generator=tasks.stream(VALID.test_seed, "split"))[VALID.train_size :]
    inputs, labels = pool.inputs.clone(), pool.labels.clone()
    inputs[reserved], labels[reserved] = torch.nan, labels[reserved].flip(0)
    spoiled = replace(pool, inputs=inputs, labels=labels)
    monkeypatch.setattr(data, "read", lambda settings: spoiled)
    assert untimed(work.search(asked, place(tmp_path, "b"))) == untimed(honest)


def test_images_are_held_out_of_the_training_file_alone(tmp_path):
    folder = write_images(tmp_path / "d")
    settings = Settings("fashion-mnist", str(folder), 80, 0.0, "cnn-4", 1, 16, validation=0.2)
    task = tasks.load(settings, 0)
    assert (len(task.labels), len(task.test_labels)) == (64, 16)
    whole = tasks.load(replace(settings, validation=0.0), 0)
    assert torch.equal(torch.cat([task.inputs[:], task.test_inputs[:]]), whole.inputs[:])


# ---- each point once


def points_of(grid):
    claimed = []
    while trial := grid.claim():
        claimed.append(trial.user_attrs[POINT])
        grid.tell(trial, 1.0, TrialState.COMPLETE)
    return claimed


def test_points_queued_twice_are_claimed_once(storage):
    grid = Grid.open(storage, "s", BASE)
    grid.study.add_trial(create_trial(state=TrialState.WAITING, user_attrs={POINT: 2}))
    assert points_of(Grid.open(storage, "s", BASE)) == [0, 1, 2, 3]
    assert len(grid.ended()) == 4
    assert not grid.trials(TrialState.WAITING, TrialState.RUNNING)


def test_a_worker_declared_dead_that_lives_changes_nothing(storage):
    grid = Grid.open(storage, "s", BASE)
    slow = grid.claim()
    storage.set_trial_state_values(slow._trial_id, TrialState.FAIL)  # what a missed heartbeat leads to
    assert points_of(grid) == [1, 2, 3, 0]
    grid.tell(slow, 0.0, TrialState.COMPLETE)
    assert {index: trial.value for index, trial in grid.ended().items()} == dict.fromkeys(range(4), 1.0)


def test_an_interrupted_point_is_queued_again_at_once(tmp_path, monkeypatch):
    def interrupted(run, place):
        raise KeyboardInterrupt

    asked = Search(VALID, (BASE,))
    monkeypatch.setattr(work, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work.search(asked, place(tmp_path))
    monkeypatch.setattr(work, "train", lambda run, place: result(run.settings.lr))
    values, (ended,) = work.search(asked, place(tmp_path))
    assert values == {"lr": 0.05, "weight_decay": 1e-4}  # the first among equals
    assert [point["error"] for point in ended["points"]] == [5.0, 5.0, 10.0, 10.0]


def test_a_point_that_raises_is_told_and_tried_again_by_the_next_call(tmp_path, monkeypatch):
    trained = []

    def train(run, place):
        trained.append(run.settings.lr)
        if run.settings.lr == 0.1 and broken:
            raise ValueError("no memory")
        return result(0.5)

    monkeypatch.setattr(work, "train", train)
    asked, broken = Search(VALID, (Stage("base", "SGD", {"lr": (0.05, 0.1)}),), seeds=2), True
    with pytest.raises(LabError, match=r"1 of 2 points of stage base failed.*'lr': 0\.1.*ValueError: no memory"):
        work.search(asked, place(tmp_path))
    assert trained == [0.05, 0.05, 0.1]
    broken = False
    work.search(asked, place(tmp_path))
    assert trained == [0.05, 0.05, 0.1, 0.1, 0.1]


def test_another_search_in_the_same_storage_is_another_study():
    first, other = Search(VALID, (BASE,)), Search(replace(VALID, epochs=9), (BASE,))
    assert first.digest(BASE, {}) != other.digest(BASE, {})
    assert first.digest(BASE, {"rho": 0.1}) != first.digest(BASE, {"rho": 0.2})


def test_a_point_in_the_worst_quarter_gets_no_further_seed(tmp_path, monkeypatch):
    seen = Counter()

    def train(run, place):
        seen[run.settings.lr] += 1
        return result(run.settings.lr)

    monkeypatch.setattr(work, "train", train)
    lrs = (0.1, 0.2, 0.3, 0.4, 0.9, 0.05)
    asked = Search(VALID, (Stage("base", "SGD", {"lr": lrs}),), seeds=3)
    values, (ended,) = work.search(asked, place(tmp_path))
    assert values == {"lr": 0.05}
    assert [point["dropped"] for point in ended["points"]] == [False] * 4 + [True, False]
    assert seen == {0.1: 3, 0.2: 3, 0.3: 3, 0.4: 3, 0.9: 1, 0.05: 3}


def test_a_storage_that_cannot_be_opened_is_told_without_its_password():
    with pytest.raises(LabError, match="cannot open storage nonsense"):
        open_storage("nonsense")
    assert shown("postgresql://user:secret@host/db") == "postgresql://...@host/db"


# ---- several processes, one of them killed


def lines(log, word):
    text = log.read_text() if log.exists() else ""
    return [line.split(maxsplit=2) for line in text.splitlines() if line.startswith(word)]


def killed_in_the_middle_of_a_point(worker, log):
    """Kill -9 once the worker has ended a point and is in another; return that point."""
    deadline, pid = time.monotonic() + 180, str(worker.process.pid)
    while time.monotonic() < deadline:
        started = [point for _, who, point in lines(log, "start") if who == pid]
        ended = [point for _, who, point in lines(log, "end") if who == pid]
        if ended and len(started) == len(ended) + 1:
            worker.kill()
            worker.end()
            if len([1 for _, who, _ in lines(log, "end") if who == pid]) == len(ended):
                return started[-1]
            raise AssertionError("the point ended before the kill")
        assert worker.process.is_alive(), worker.end()[0]
        time.sleep(0.005)
    raise AssertionError("no point was under way in time")


def test_workers_share_a_study_one_is_killed_nothing_is_lost_and_nothing_runs_twice(tmp_path, monkeypatch):
    """On SQLite, or on the empty database that STEPPE_TEST_STORAGE names."""
    url, log = os.environ.get("STEPPE_TEST_STORAGE", f"sqlite:///{tmp_path / 'study.db'}"), tmp_path / "log"
    first, *others = [Forked(search_two_stages, url, log, 0.2) for _ in range(3)]
    lost = killed_in_the_middle_of_a_point(first, log)
    outputs = [worker.end(300) for worker in others]
    assert [code for _, code in outputs] == [0, 0], outputs
    assert [output for output, _ in outputs] == ["{'lr': 0.05, 'rho': 0.1}\n"] * 2

    points = [f"SGD lr={lr}" for lr in LRS] + [f"SAM(rho={rho}) lr=0.05" for rho in (0.1, 0.2, 0.3)]
    assert Counter(point for _, _, point in lines(log, "end")) == Counter(points)
    assert Counter(point for _, _, point in lines(log, "start")) == Counter([*points, lost])
    assert len({who for _, who, _ in lines(log, "end")}) == 3

    monkeypatch.setattr(work, "train", lambda run, place: pytest.fail("trained again"))
    assert work.search(TWO_STAGES, Worksite(url, "test", tmp_path))[0] == {"lr": 0.05, "rho": 0.1}


def test_processes_here_find_what_one_alone_finds(tmp_path):
    asked = Search(VALID, (Stage("radius", "SAM(rho={rho})", {"rho": (0.05, 0.5)}),), seeds=2)
    alone = work.search(asked, place(tmp_path, "a"))
    assert untimed(work.search(asked, place(tmp_path, "b"), workers=2)) == untimed(alone)


# ---- a database server that is away for a while


class Away:
    """Makes calls of a storage fail as those to a server that restarts do, for a number of times."""

    def __init__(self, storage, monkeypatch, *names):
        self.left = 0
        for name in names:
            monkeypatch.setattr(storage, name, self.failing(getattr(storage, name)))

    def failing(self, call):
        def tried(*arguments, **options):
            if self.left:
                self.left -= 1
                raise StorageInternalError("commit") from OperationalError("SELECT", {}, ConnectionError("restart"))
            return call(*arguments, **options)

        return tried


def test_a_search_goes_on_when_its_server_is_away_for_a_moment(storage, monkeypatch):
    monkeypatch.setattr(study, "WAITS", (0.01, 0.01, 0.01))
    grid = Grid.open(storage, "s", BASE)
    names = ("_get_trials", "set_trial_state_values", "set_trial_user_attr", "record_heartbeat")
    away, ended = Away(storage, monkeypatch, *names), []
    while True:
        away.left = 2
        if (trial := grid.claim()) is None:
            break
        away.left = 2
        grid.note(trial, [1.0], cost=1.0, seed=0)
        away.left = 2
        grid.tell(trial, 1.0, TrialState.COMPLETE)
        ended.append(trial.user_attrs[POINT])
    assert ended == [0, 1, 2, 3]
    assert sorted(grid.ended()) == [0, 1, 2, 3]
    away.left = 4
    with pytest.raises(LabError, match=r"the storage of the search failed: .*restart"):
        grid.trials()


def test_a_call_that_is_wrong_is_not_tried_again(storage, monkeypatch):
    grid = Grid.open(storage, "s", BASE)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits"))

    def full(*arguments, **options):
        raise StorageInternalError("commit") from OperationalError("", {}, sqlite3.OperationalError("disk is full"))

    monkeypatch.setattr(storage, "_get_trials", full)
    with pytest.raises(LabError, match="disk is full"):
        grid.trials()


def test_a_password_is_in_no_message_and_not_among_the_arguments(tmp_path, monkeypatch):
    url = "postgresql+nodriver://me:se@cret@host/db?password=secret"
    assert shown(url) == "postgresql+nodriver://...@host/db"
    with pytest.raises(LabError) as told:
        open_storage(url)
    assert "cret" not in str(told.value)
    words = ["compare", "--trials", 1, "--method", "SAM", "--out", tmp_path / "r"]
    for given in (url, "postgresql://host/db?passwd=secret"):
        result = steppe_cli(*words, "--storage", given)
        assert (result.exit_code, "cret" in result.stderr) == (2, False)
        assert "STEPPE_STORAGE" in result.stderr
    result = steppe_cli(*words, env={"STEPPE_STORAGE": url})  # which is allowed, and here of no driver
    assert (result.exit_code, "cret" in result.output) == (2, False)
    assert "cannot open storage" in result.stderr
    assert not (tmp_path / "r").exists()
