"""A run that stays at the loss of a guess is told so, once; others are not."""

import warnings

import pytest
import torch
from torch import nn

import steppe
from steppe.engine import guess
from steppe.engine.guess import Guess, class_numbers
from tests.cases import sgd, world


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "EVERY", 1)


def train(lr: float, steps: int, rho: float = 0.05, **options: object) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.arange(64) % 4
    x[torch.arange(64), y] += 4.0
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.weight)
    opt = steppe.SAM(sgd(model, lr=lr), rho, **options)
    for _ in range(steps):
        opt.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y))


def test_a_run_that_learns_nothing_is_told_once() -> None:
    with pytest.warns(UserWarning, match=r"was not below 1\.\d+, that of a model that knows nothing") as seen:
        train(1e-6, 45)
    assert len(seen) == 1
    assert "clip" not in str(seen[0].message)
    with pytest.warns(UserWarning, match=r"clip=0\.5"):
        train(1e-6, 25, m=4, sampled=1, parallel=False)


def test_a_run_that_learns_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(0.1, 45)
        train(1e-6, guess.READINGS - 1)  # too early to tell
        train(1e-6, 45, rho=0.0)  # not by the radius


def test_the_floor_is_the_entropy_of_unequal_shares() -> None:
    seen = Guess()
    assert seen.entropy() is None
    seen.labels.update([0] * 90 + [1] * 10)
    expected = -0.9 * torch.tensor(0.9).log() - 0.1 * torch.tensor(0.1).log()
    assert seen.entropy() == pytest.approx(float(expected) + 1 / 200)
    seen.labels.clear()
    seen.labels.update(range(100))  # every label once: how many classes there are cannot be told
    assert seen.entropy() is None


def test_only_plain_cross_entropies_of_class_numbers_are_judged() -> None:
    w = world()
    y = torch.tensor([0, 1, -100, 2] + [1] * 6)
    both = steppe.Batches([w.batch, steppe.Batch.supervised(w.model, w.criterion, w.x, y)])
    assert class_numbers(both) == [*w.y.tolist(), 0, 1, 2, *[1] * 6]
    for criterion in (
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="none", weight=torch.ones(3, dtype=torch.float64)),
        lambda out, y: out.sum(1),
    ):
        assert class_numbers(steppe.Batch.supervised(w.model, criterion, w.x, w.y)) == []
    shares = torch.softmax(torch.randn(10, 3, dtype=torch.float64), 1)
    assert class_numbers(steppe.Batch.supervised(w.model, w.criterion, w.x, shares)) == []
    assert class_numbers(lambda: None) == []


def test_a_loss_of_ones_own_with_a_criterion_is_not_judged() -> None:
    """Only of ``Batch.supervised`` it is known that the second entry of the data are the targets."""
    w = world()

    class Own:
        criterion = nn.CrossEntropyLoss(reduction="none")

        def __call__(self, model, data):
            return self.criterion(model(data["x"]), data["y"])

    assert class_numbers(steppe.Batch(w.model, Own(), {"x": w.x, "y": w.y})) == []
