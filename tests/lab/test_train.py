import math
from dataclasses import replace

import pytest
import torch

from steppe.lab import models, spec, tasks
from steppe.lab.errors import LabError
from steppe.lab.runs import Run
from steppe.lab.settings import Settings
from steppe.lab.train import collapsed, initial_model, orders, train

from .helpers import TINY, run, write_images


@pytest.mark.parametrize("text", ["SGD", "SAM(rho=0.2, m=16)", "ESAM(rho=0.1)", "RWSAM(rho=0.1)"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(text):
    assert train(run(text)).curves == train(run(text)).curves != train(run(text, seed=1)).curves


def test_methods_share_split_noise_initial_weights_and_order():
    one, other = run("SGD"), run("SAM(rho=0.2, epochs=2x)")
    a, b = tasks.load(TINY, 0), tasks.load(TINY, 0)
    for name in ("inputs", "labels", "test_inputs"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.labels, tasks.load(TINY, 1).labels)
    torch.rand(5)  # whatever was drawn before
    for p, q in zip(initial_model(one, a).parameters(), initial_model(other, b).parameters(), strict=True):
        assert torch.equal(p, q)
    longer = list(orders(other, b))
    assert len(longer) == 6
    for mine, yours in zip(orders(one, a), longer, strict=False):
        assert all(map(torch.equal, mine, yours))


def test_rho_zero_is_sgd():
    assert train(run("SAM(rho=0.0)")).test_error == train(run("SGD")).test_error


def test_batches_are_full_and_disjoint():
    settings = replace(TINY, train_size=200)
    task = tasks.load(settings, 0)
    for batches in orders(run("SGD", settings=settings), task):
        assert [len(rows) for rows in batches] == [64, 64, 64]
        assert len(torch.cat(batches).unique()) == 192


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
def test_noise_is_symmetric(share):
    labels = torch.arange(20000) % 10
    noisy = tasks.noisy(labels, share, 10, seed=3)
    changed = noisy != labels
    assert changed.double().mean().item() == pytest.approx(0.9 * share, abs=0.01)  # one redrawn label in ten is right
    assert torch.bincount(noisy[changed], minlength=10).double().std() / changed.sum() < 0.01
    assert torch.equal(tasks.noisy(labels, 0.0, 10, seed=3), labels)


def test_split_has_no_overlap_and_clean_test_labels():
    task = tasks.load(replace(TINY, noise=0.0), 0)
    assert len(task.labels) + len(task.test_labels) == 1797
    mean, spread = task.inputs.mean().item(), task.inputs.std().item()
    assert (mean, spread) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_passes_and_curves():
    sgd, sam, twice = train(run("SGD")), train(run("SAM(rho=0.1)")), train(run("SGD(epochs=2x)"))
    assert [record.passes for record in (sgd, sam, twice)] == [3, 6, 6]
    assert [record.steps for record in (sgd, sam, twice)] == [12, 12, 24]
    assert sgd.curves["gap"] == [None] * 3
    assert all(gap > 0 for gap in sam.curves["gap"])
    assert sam.curves["eps_norm"] == pytest.approx([0.1] * 3, rel=1e-4)
    assert sam.curves["test_error"][-1] == sam.test_error
    assert (
        eval(sam.rule, vars(__import__("steppe")))
        == spec.build(spec.parse("SAM(rho=0.1)"), models.mlp([2, 2]), TINY, full=lambda: None).rule
    )


def test_long_runs_are_evaluated_at_some_epochs_and_at_the_last():
    record = train(run("SGD", settings=replace(TINY, epochs=101)))
    assert record.curves["epoch"] == [*range(3, 100, 3), 101]


def test_collapse_is_flagged():
    assert collapsed(None, 10, 1)
    assert collapsed(math.log(10), 10, 400)
    assert not collapsed(math.log(10), 10, 5)  # healthy, and has not learned yet
    assert not collapsed(1.9, 10, 400)
    assert train(run("SGD", settings=replace(TINY, lr=1e-6, epochs=40))).collapsed  # never left the start
    blown_up = train(run("SGD", settings=replace(TINY, lr=1e6)))
    assert blown_up.collapsed


def still(**changes):
    """Settings under which nothing moves, so that a run ends where it starts."""
    return replace(TINY, epochs=1, lr=1e-30, weight_decay=0.0, **changes)


def test_a_run_may_start_where_another_method_ends():
    before = train(run("SAM(rho=0.1)", settings=replace(TINY, epochs=2, lr=0.1, weight_decay=0.0)))
    settings = still(start="SAM(rho=0.1, epochs=2)", start_lr=0.1)
    assert train(run("SGD", settings=settings)).test_error == before.test_error
    assert train(run("SGD", settings=still())).test_error != before.test_error


def test_a_run_may_start_from_a_file(tmp_path):
    model = initial_model(run("SGD", seed=5), tasks.load(TINY, 0))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    task = tasks.load(TINY, 0)
    loaded = initial_model(run("SGD", settings=still(start=str(tmp_path / "w.pt"))), task)
    for mine, saved in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, saved)
    with pytest.raises(LabError, match=r"no weights at nowhere\.pt"):
        initial_model(run("SGD", settings=still(start="nowhere.pt")), task)


def test_every_method_trains():
    for name in spec.choices():
        settings = replace(TINY, optimizer="adamw", lr=1e-3) if name == "PreconditionedSAM" else TINY  # needs moments
        assert train(run(f"{name}(epochs=1)", settings=settings)).test_error < 1


def test_images_train_a_convolutional_net(tmp_path):
    folder = write_images(tmp_path / "d")
    settings = Settings("fashion-mnist", str(folder), 64, 0.0, "cnn-4", epochs=2, batch_size=32)
    record = train(Run(spec.parse("SAM(rho=0.01)"), 0, settings))
    assert record.classes == 10
    assert record.curves["train_loss"][-1] < math.log(10) + 0.1
    with pytest.raises(LabError, match="train-size 97 exceeds the 96 examples"):
        tasks.check(replace(settings, train_size=97))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"noise": 1.5}, "noise must be a number in"),
        ({"lr": math.nan}, "lr must be a positive number"),
        ({"weight_decay": -1.0}, "weight-decay must be"),
        ({"batch_size": 512}, "batch-size 512 exceeds the 256 training examples"),
        ({"validation": 1.0}, "validation must be a share"),
        ({"validation": 0.9}, "batch-size 64 exceeds the 26 training examples beside the 230"),
        ({"start_lr": 0.0}, "start-lr must be a positive number"),
        ({"data_dir": "d"}, "digits come with scikit-learn"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(LabError, match=message):
        replace(TINY, **change)
