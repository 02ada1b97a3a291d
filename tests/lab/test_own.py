"""A task of a user's own: data, model, loss and metric."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from steppe.lab import presets, tasks
from steppe.lab.errors import LabError
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


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("one_mean", {}, r"loss must return one value an example, shape \(2,\) for two, not \(\)"),
        ("no_model", {}, "must return train, test, model"),
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


def test_functions_that_fail_are_told(monkeypatch):
    broken = own_tasks.regression() | {"model": lambda: nn.Linear(3, 1)}
    monkeypatch.setattr(own_tasks, "regression", lambda: broken)
    from steppe.lab import data

    data._read.cache_clear()
    with pytest.raises(LabError, match="functions fail on two examples: RuntimeError"):
        planned("regression")
    data._read.cache_clear()
