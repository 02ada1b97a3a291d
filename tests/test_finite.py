"""Steps whose gradients are not finite change nothing and say so."""

import copy

import pytest
import torch

import steppe
from steppe.factored.engine import SharedPasses
from steppe.pieces.protocol import declared
from tests.cases import CASES, METHODS, assert_equal_states, optimizer, same_bits, sgd, world
from tests.models import Faulty


def oracle_of(opt, batch):
    return opt._stepper.oracle(batch)


@pytest.mark.parametrize(
    ("case", "value"),
    [(case, torch.nan) for case in CASES] + [(case, torch.inf) for case in METHODS],
    ids=lambda v: getattr(v, "name", v),
)
@pytest.mark.filterwarnings("ignore:a gradient is not finite")
@pytest.mark.usefixtures("rehearsed_once")
def test_a_bad_gradient_in_any_pass_skips_the_step(case, value: float) -> None:
    w = world(torch.float32, Faulty)
    opt = optimizer(case, w, "adam")
    opt._stepper.parallel = opt._stepper.parallel is True
    for batch in w.batches(2):
        opt.step(batch)
    probe = copy.deepcopy((w, opt))
    probe[1].step(probe[0].batch)  # may rehearse
    probe[1].load_state_dict(copy.deepcopy(opt.state_dict()))
    probe[0].model.calls = 0
    probe[1].step(probe[0].batch)
    forwards = probe[0].model.calls
    before, state = w.weights(), copy.deepcopy(opt.state_dict())
    skipped = 0
    for spoil_at in range(1, forwards + 1):
        w.model.calls, w.model.fail_at, w.model.how = 0, (spoil_at,), value
        trial = copy.deepcopy((w, opt))
        if trial[1]._stepper.parallel:  # rehearse, and come back
            trial[0].model.fail_at = ()
            for m in {getattr(trial[1]._stepper.rule, "m", None), None}:
                SharedPasses().entry(oracle_of(trial[1], trial[0].batch), trial[0].batch, m)
            trial[0].model.calls, trial[0].model.fail_at = 0, (spoil_at,)
        trial[1].step(trial[0].batch)
        if trial[1].telemetry.was_skipped:
            skipped += 1
            assert same_bits(before, trial[0].parameters())
            assert_equal_states(trial[1].state_dict(), state)
            assert all(p.grad is None for p in trial[0].parameters())
            assert trial[1].telemetry.skipped == 1
        assert all(p.isfinite().all() for p in trial[0].parameters())
        trial[0].model.fail_at = ()
        trial[1].step(trial[0].batch)
        assert not trial[1].telemetry.was_skipped
    # a spoiled probe of ESAM, or search of XSAM, only spoils its choice
    extra_forwards = (case.selects and forwards > 2) or case.name == "XSAM"
    assert skipped == forwards if not extra_forwards else skipped >= 2


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
def test_one_bad_example_of_a_micro_batch_skips_the_step() -> None:
    w = world(torch.float32)
    w.x[7] = torch.inf
    opt = steppe.SAM(sgd(w), m=4, parallel=False)
    before = w.weights()
    opt.step(w.batch)
    assert opt.telemetry.was_skipped
    assert same_bits(before, w.parameters())


def test_skipping_warns_once() -> None:
    w = world(torch.float32)
    w.x[7] = torch.inf
    opt = steppe.SAM(sgd(w))
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(w.batch)
    opt.step(w.batch)
    assert opt.telemetry.skipped == 2


def test_no_pass_is_taken_at_weights_that_are_not_finite() -> None:
    """A loss that refuses such values would raise, and on an accelerator end the process."""
    w, away = world(torch.float32), []
    w.model.register_forward_pre_hook(lambda m, _: away.append(all(p.isfinite().all() for p in m.parameters())))
    w.x[7] = torch.inf
    opt = steppe.SAM(sgd(w))
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(w.batch)
    assert away == [True]
    e = torch.tensor([torch.nan, 1.0])
    p = torch.ones(2)
    # where no value is read, on an accelerator or a rank
    steppe.engine.vector.shift_(p, e, 1.0, finite=torch.tensor(torch.nan))
    assert torch.equal(p, torch.ones(2))


def test_without_the_check_nothing_is_skipped() -> None:
    w = world(torch.float32)
    w.x[7] = torch.inf
    opt = steppe.SAM(sgd(w), check_finite=False)
    opt.step(w.batch)
    assert opt.telemetry.skipped == 0
    assert not all(p.isfinite().all() for p in w.parameters())


@pytest.mark.parametrize("case", METHODS, ids=lambda c: c.name)
def test_telemetry(case) -> None:
    w = world()
    opt = optimizer(case, w, rho=0.1)
    assert opt.telemetry.gap is None
    opt.step(w.batch)
    seen = opt.telemetry
    assert seen.rho == 0.1
    assert seen.steps == 1
    one_pass = case.name == "MomentumSAM"  # at w + eps; its first eps is 0
    assert (seen.g_norm is None) if one_pass else seen.g_norm > 0
    assert seen.g_adv_norm > 0 or case.selects
    assert (seen.eps_norm > 0) != one_pass
    own_loss = case.name != "NSAM" and not one_pass
    assert (seen.gap is not None) == own_loss
    if own_loss:
        assert seen.gap > 0
    assert (seen.cosine is not None) == (declared(opt.rule).g and case.name != "ReweightedSharpness probe")


def test_the_cosine_is_kept_when_asked_for() -> None:
    w = world()
    opt = steppe.SAM(sgd(w), 0.3, cosine=True)
    w.batch()
    g = torch.cat([p.grad.reshape(-1) for p in w.parameters()])
    opt.step(w.batch)
    g_adv = torch.cat([p.grad.reshape(-1) for p in w.parameters()])
    torch.testing.assert_close(opt.telemetry.cosine, torch.cosine_similarity(g, g_adv, dim=0))
    torch.testing.assert_close(opt.telemetry.g_norm, g.norm())
    torch.testing.assert_close(opt.telemetry.eps_norm, torch.tensor(0.3, dtype=torch.float64))
