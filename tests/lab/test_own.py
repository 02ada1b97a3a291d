"""A task of a user's own: data, model, loss and metric."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from steppe.lab import files, metrics, own, presets, tasks
from steppe.lab.errors import LabError
from steppe.lab.record import Record
from steppe.lab.train import Session, train

from . import own_tasks

GIVEN = {"epochs": 3, "batch_size": 32}


def planned(name, **given):
    return presets.planned(f"tests.lab.own_tasks:{name}", GIVEN | given, ["SGD", "SAM(rho=0.05, m=8)"], seeds=1)


def test_a_regression_trains_and_reports_its_own_metric():
    first = planned("regression").runs()[0]
    session = Session(first)
    list(session.fit())
    found = session.record()
    inputs, targets = own_tasks.regression()["test"]
    with torch.no_grad():
        error = (session.model(inputs) - targets).abs().mean()
    assert found.test_error == pytest.approx(float(error))
    assert (found.metric, found.shown, found.classes, found.collapsed) == ("absolute error", found.test_error, 0, False)


def test_the_model_and_the_order_depend_on_the_seed_alone():
    sgd, sam = planned("regression").runs()
    assert torch.equal(Session(sgd).model.weight, Session(sam).model.weight)
    assert train(sgd).curves == train(sgd).curves


def test_tokens_train_under_m_sam():
    run = planned("tokens", epochs=30, lr=1.0).runs()[1]
    found = train(run)
    assert found.metric == "nats a token"
    assert found.test_error < 0.1 < found.curves["test_error"][0]


def test_classes_need_neither_loss_nor_metric():
    found = train(planned("classes", noise=0.2).runs()[0])
    assert found.metric == "error %"
    assert found.shown == 100 * found.test_error
    assert 32 * found.test_error == pytest.approx(round(32 * found.test_error))


def test_validation_examples_are_cut_from_the_training_ones():
    settings = planned("regression").settings
    held = tasks.load(replace(settings, validation=0.25), 0)
    assert (len(held.labels), len(held.test_labels)) == (96, 32)
    assert held.own is not None


def test_the_examples_that_a_task_holds_out_are_its_searches_and_final_runs_train_on_them():
    asked = presets.asked("tests.lab.own_tasks:validated", GIVEN, ["SAM"])
    assert asked.validation == 0.25
    train, validation = (own_tasks.validated()[key] for key in ("train", "validation"))
    searched = tasks.load(replace(asked.settings, validation=asked.validation), 3)
    assert searched.own is not None
    for found, given in ((searched.labels, train[1]), (searched.test_labels, validation[1])):
        assert sorted(found.flatten().tolist()) == sorted(given.flatten().tolist())
    assert len(tasks.load(asked.settings, 3).labels) == 128
    for option, message in (({"validation": 0.5}, "leave --validation out"), ({}, "leave --train-size out")):
        given = GIVEN | ({} if option else {"train_size": 64})
        with pytest.raises(LabError, match=message):
            presets.asked("tests.lab.own_tasks:validated", given, ["SAM"], **option)


def test_inputs_by_name_train_as_one_tensor_does():
    for plain, named in zip(planned("regression").runs(), planned("named_inputs").runs(), strict=True):
        assert train(plain).curves["test_error"] == pytest.approx(train(named).curves["test_error"], rel=1e-5)


def test_a_metric_of_whole_sets_sees_all_examples_at_once(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 10)  # examples in a forward pass
    session = Session(planned("root").runs()[0])
    list(session.fit())
    inputs, targets = own_tasks.root()["test"]
    with torch.no_grad():
        error = (session.model(inputs) - targets).square().mean().sqrt()
    assert session.record().test_error == pytest.approx(float(error))


def test_adamw_has_a_learning_rate_of_its_own():
    rates = [planned("regression", **given).settings.lr for given in ({}, {"optimizer": "adamw"})]
    assert rates == [0.05, 0.001]
    assert planned("regression", optimizer="adamw", lr=0.05).settings.lr == 0.05


def test_a_users_functions_are_tried_before_the_runs_and_not_in_them(monkeypatch):
    tried = []
    monkeypatch.setattr(own.OwnTask, "check", lambda self: tried.append(1))
    for run in planned("regression").runs():
        train(run)
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("without_loss", {}, r"targets are class numbers of shape \(n,\), and train has float32 \(128, 1\)"),
        ("misspelt", {}, "returns the key 'modle', which a task does not have; did you mean model?"),
        ("arrays", {}, "train must be tensors .* not numpy.ndarray and numpy.ndarray"),
        ("one_number", {}, r"metric must return one value an example, .* not \(\); for one number .* whole=True"),
        ("higher_nothing", {}, "whole and higher say what the metric is, and the task has no metric"),
        ("one_mean", {}, r"loss must return one value an example, shape \(2,\) for two, not \(\)"),
        ("no_model", {}, "must return train, test and model; model is missing"),
        ("regression", {"noise": 0.4}, "noise 0.4 redraws class numbers"),
        ("regression", {"model": "mlp-8"}, "brings its own model; leave --model out"),
    ],
)
def test_mistakes_are_told(name, given, message):
    with pytest.raises(LabError, match=message):
        planned(name, **given)


def test_a_metric_that_is_not_finite_is_told():
    with pytest.raises(LabError, match="metric of SGD seed 0 is not finite"):
        train(planned("regression", lr=1e6, epochs=9).runs()[0])


def test_a_record_whose_training_metric_is_not_finite_is_read_again(tmp_path):
    found = replace(train(planned("regression").runs()[0]), train_error=None)
    files.save(tmp_path / "record.json", found)
    assert files.load(tmp_path / "record.json", Record) == found


def test_functions_that_fail_are_told(monkeypatch):
    broken = own_tasks.regression() | {"model": lambda: nn.Linear(3, 1)}
    monkeypatch.setattr(own_tasks, "regression", lambda: broken)
    from steppe.lab import data

    data._read.cache_clear()
    with pytest.raises(LabError, match="model or loss fails on two examples: RuntimeError"):
        planned("regression")
    data._read.cache_clear()
