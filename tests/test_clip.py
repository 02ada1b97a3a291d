"""Clipping: the final gradient, once, over all parameters."""

import pytest
import torch
from torch import nn

import steppe
from tests.cases import CASES, Case, assert_close, optimizer, same_bits, scaler, sgd, world

# what moves beside the base is scaled too: below
FED_ALONE = [c for c in CASES if not any(word in c.name for word in ("W", "weighted", "friendly"))]


@pytest.mark.parametrize("case", FED_ALONE, ids=lambda case: case.name)
def test_the_gradient_that_the_base_sees_is_clipped_as_torch_does(case: Case) -> None:
    """And once: with clip_grad_norm_ in a pre-hook of the base the step is the same."""
    ours, theirs = world(), world()
    a, b = optimizer(case, ours, "momentum"), optimizer(case, theirs, "momentum")
    a._stepper.max_norm = 0.05

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)

    b.base.register_step_pre_hook(clip)
    for mine, yours in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(mine)
        b.step(yours)
        assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    assert a.telemetry.update_norm > 0.05


def test_what_moves_beside_keeps_its_weight_against_the_loss() -> None:
    """WSAM beside SGD: the whole step is shorter by the factor of its gradient, and has the same direction."""
    ours, theirs = world(), world()
    a = steppe.WSAM(sgd(ours), rho=0.1, gamma=0.8, max_norm=0.05)
    b = steppe.WSAM(sgd(theirs), rho=0.1, gamma=0.8)
    start = ours.weights()
    a.step(ours.batch)
    b.step(theirs.batch)
    factor = 0.05 / (a.telemetry.update_norm + 1e-6)
    torch.testing.assert_close(a.telemetry.update_norm, b.telemetry.g_norm)
    for w, p, q in zip(start, ours.weights(), theirs.weights(), strict=True):
        torch.testing.assert_close(p - w, factor * (q - w), rtol=1e-9, atol=1e-12)


def test_a_shorter_gradient_is_left_alone() -> None:
    ours, theirs = world(), world()
    steppe.GSAM(sgd(ours), max_norm=1e6).step(ours.batch)
    steppe.GSAM(sgd(theirs)).step(theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


def test_after_unscaling() -> None:
    ours, theirs = world(), world()
    s = scaler(4096.0)
    steppe.SAM(sgd(ours), max_norm=0.05).step(ours.batch, scaler=s)
    steppe.SAM(sgd(theirs), max_norm=0.05).step(theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bad_norms(bad: float) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number > 0 or None"):
        steppe.SAM(sgd(world()), max_norm=bad)


@pytest.mark.parametrize("bad", ["everyone", 0, -2, True, 1.5])
def test_bad_sync(bad: object) -> None:
    with pytest.raises(ValueError, match="sync must be 'auto', 'local', 'global' or a positive number of ranks"):
        steppe.SAM(sgd(world()), sync=bad)
