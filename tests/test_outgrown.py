"""A correction that has outgrown the gradient while the loss rose is told once; either alone is not."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

import steppe
from steppe.engine import outgrown
from steppe.engine.outgrown import READINGS, RISE, Outgrown
from tests.cases import sgd

SAMPLED = {"m": 1, "sampled": 1, "parallel": False}
FALL, HIGH = [2.0] * READINGS, [2.0 + 1.1 * RISE] * READINGS


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgrown, "EVERY", 1)


@pytest.mark.parametrize(
    ("losses", "ratio", "told"),
    [
        (FALL + HIGH, 1.1, True),
        (FALL + HIGH, 0.9, False),  # the correction is short
        (FALL + [2.0 + 0.9 * RISE] * READINGS, 1.1, False),  # a rise that good runs have
        (HIGH + FALL, 100.0, False),  # a run that fits its data
        (FALL + HIGH[1:], 1.1, False),  # too early to tell
        ([*FALL, float("nan"), *HIGH], 1.1, True),
    ],
)
def test_what_is_told(losses: list[float], ratio: float, told: bool) -> None:
    seen = Outgrown()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for loss in losses:
            seen.read(1.0, loss, ratio, 0.1)
    assert (seen.told, len(found)) == (told, told)
    if told:
        text = (
            f"was on average 1.1 times as long as the batch's gradient, and the loss, {HIGH[0]:.3g}, is above the 2 of"
        )
        assert text in str(found[0].message)


def test_a_rise_of_the_learning_rate_begins_anew() -> None:
    seen = Outgrown()
    for loss in FALL:
        seen.read(1.0, loss, 2.0, 0.1)
    for loss in HIGH * 3:
        seen.read(1.0, loss, 2.0, 0.2)
    assert not seen.told
    with pytest.warns(UserWarning, match=r"try clip=0\.5"):
        seen.read(1.0, 6.0, 2.0, 0.01)


def run(steps: int, **options: object) -> steppe.SharpnessAware:
    """A fit by linear regression, then a radius that throws it out."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y, model = x.sum(1, keepdim=True), nn.Linear(4, 1)
    criterion = lambda out, t: (out - t).square().mean(1)  # noqa: E731
    opt = steppe.SAM(sgd(model, lr=0.02), lambda step, group: 0.01 if step < 100 else 30.0, **SAMPLED, **options)
    for _ in range(steps):
        opt.step(steppe.Batch.supervised(model, criterion, x, y))
    return opt


def test_a_run_that_is_thrown_out_is_told_once() -> None:
    with pytest.warns(UserWarning, match="over the last 10 steps the correction of sampled= was on average") as seen:
        opt = run(160)
    assert len(seen) == 1
    assert opt.telemetry.correction_mean > 1
    assert not run(100)._stepper.outgrown.told
    assert not run(160, clip=0.5)._stepper.outgrown.told


def test_a_resumed_run_and_other_methods_are_not_judged() -> None:
    opt = run(100)
    again = copy.deepcopy(opt._stepper.outgrown)
    assert again.first == opt._stepper.outgrown.first > 1
    resumed = run(0)
    resumed._stepper.outgrown.see(opt._stepper.oracle(lambda: 0.0), replace(opt.telemetry, steps=1000))
    assert not resumed._stepper.outgrown.losses
    model = nn.Linear(2, 1)
    assert all(
        method(sgd(model), 0.1, **options)._stepper.outgrown is None
        for method, options in ((steppe.SAM, {}), (steppe.SAM, {"m": 4}), (steppe.WSAM, {"ascent": 4}))
    )
    assert steppe.LookSAM(sgd(model), 0.1, **SAMPLED)._stepper.outgrown is not None
