"""GradScaler: both passes scaled, gradients unscaled before anything uses them, an overflow in either skips."""

import copy
import pickle

import pytest
import torch
from torch import nn

import steppe
from tests.cases import CASES, Case, each_case_and_base, optimizer, same_bits, scaler, sgd, sgdm, world
from tests.models import Faulty

SCALE = 1024.0


@each_case_and_base
def test_a_scaled_step_is_the_step(case: Case, base: str) -> None:
    """The scale is a power of two: not a bit differs, whatever is sensitive to the scale of the loss."""
    ours, theirs = world(), world()
    a, b, s = optimizer(case, ours, base), optimizer(case, theirs, base), scaler()
    for scaled, plain in zip(ours.batches(2), theirs.batches(2), strict=True):
        loss = a.step(scaled, scaler=s)
        s.update()
        torch.testing.assert_close(loss, b.step(plain), rtol=0, atol=0)
        assert same_bits(ours.weights(), theirs.weights())
        assert a.telemetry.forwards == b.telemetry.forwards
    assert s.get_scale() == SCALE


@pytest.mark.parametrize("case", [c for c in CASES if not c.looks_inside], ids=lambda case: case.name)
def test_a_closure_that_scales_its_loss(case: Case) -> None:
    ours, theirs = world(), world()
    a, b, s = optimizer(case, ours), optimizer(case, theirs), scaler()

    def closure():
        a.zero_grad()
        loss = ours.batch.losses().mean()
        s.scale(loss).backward()
        return loss

    for _ in range(3):
        a.full = ours.full  # a batch of its own is scaled by the same scaler
        a.step(closure, scaler=s)
        s.update()
        b.step(theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", ["SAM", "USAM", "WSAM", "GSAM", "FisherSAM", "FSAM"])
def test_an_overflow_in_either_pass_backs_off(name: str, at: int, check: bool) -> None:
    torch.manual_seed(0)
    model = Faulty(nn.Linear(5, 3), how=torch.inf)
    base = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = getattr(steppe, name)(base, check_finite=check, parallel=False)  # a rehearsal would count as a forward
    x, y, s = torch.randn(4, 5), torch.randint(3, (4,)), scaler()
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y, scaler=s)
    opt.step(batch)
    s.update()
    before, state = [p.detach().clone() for p in model.parameters()], copy.deepcopy(opt.state_dict())
    model.fail_at = (model.calls + at,)
    opt.step(batch)
    s.update()
    assert same_bits(before, list(model.parameters()))
    assert opt.telemetry.was_skipped
    assert s.get_scale() == SCALE / 2
    for p, kept in state["state"].items():
        assert all(torch.equal(v, opt.state_dict()["state"][p][k]) for k, v in kept.items())
    opt.step(batch)
    s.update()
    assert not opt.telemetry.was_skipped
    assert not same_bits(before, list(model.parameters()))


def test_float16_finds_its_scale_and_trains() -> None:
    """From a scale that overflows at first: the gradients of float16 autocast, never zero and never infinite after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    opt, s = (
        steppe.WSAM(sgdm(model), rho=0.05),
        scaler(2.0**24),
    )
    x, y = torch.randn(64, 16), torch.randint(4, (64,))

    def loss(model, data):
        with torch.autocast("cpu", dtype=torch.float16):
            return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").float()

    batch, losses = steppe.Batch(model, loss, (x, y), scaler=s), []
    for _ in range(40):
        losses.append(float(opt.step(batch)))
        s.update()
    assert 0 < opt.telemetry.skipped < 20
    assert s.get_scale() < 2.0**24
    assert losses[-1] < 0.3 * losses[0]


def test_bfloat16_parameters_with_a_scaler_and_a_disabled_one() -> None:
    w, other = world(torch.bfloat16), world(torch.bfloat16)
    a = steppe.SAM(sgd(w), rho=0.5)
    b = steppe.SAM(sgd(other), rho=0.5)
    off = torch.amp.GradScaler("cpu", enabled=False)
    a.step(w.batch, scaler=off)
    b.step(other.batch)
    off.update()
    assert same_bits(w.weights(), other.weights())


def test_a_forgotten_update_is_noticed() -> None:
    w, s = world(torch.float32), scaler()
    opt = steppe.SAM(sgd(w))
    opt.step(w.batch, scaler=s)
    before = w.weights()
    with pytest.raises(RuntimeError, match=r"call scaler\.update\(\) after every"):
        opt.step(w.batch, scaler=s)
    assert same_bits(before, w.weights())
    s.update()
    opt.step(w.batch, scaler=s)


def test_what_is_no_scaler_and_another_one() -> None:
    w = world(torch.float32)
    opt = steppe.SAM(sgd(w))
    before = w.weights()
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler or None, got float"):
        opt.step(w.batch, scaler=2.0)
    with pytest.raises(TypeError, match="scaler must be"):
        steppe.Batch.supervised(w.model, w.criterion, w.x, w.y, scaler="fp16")
    with pytest.raises(ValueError, match="scaler must be the one of the batch"):
        opt.step(w.batch.scaled_by(scaler()), scaler=scaler())
    assert same_bits(before, w.weights())


def test_copies_and_pickles_leave_the_scaler_behind() -> None:
    w, s = world(torch.float32), scaler()
    opt = steppe.SAM(sgd(w))
    opt.step(w.batch, scaler=s)
    pickle.loads(pickle.dumps(opt))
    model, other = copy.deepcopy((w.model, opt))
    batch = steppe.Batch.supervised(model, w.criterion, w.x, w.y)
    other.step(batch, scaler=scaler())


@pytest.mark.parametrize("at", [1, 2])
def test_after_an_error_in_a_pass_there_is_nothing_to_update(at: int) -> None:
    """A loop that catches an error, and never comes to ``scaler.update()``, goes on with the next batch."""
    w, s = world(torch.float32), scaler()
    opt = steppe.SAM(sgd(w), parallel=False)
    calls = []

    def fails(model, data):
        calls.append(None)
        if len(calls) == at:
            raise KeyError("out of memory")
        return w.criterion(model(data[0]), data[1])

    for _ in range(3):
        calls.clear()
        with pytest.raises(KeyError):
            opt.step(steppe.Batch(w.model, fails, (w.x, w.y), scaler=s))
    before = w.weights()
    opt.step(w.batch, scaler=s)
    assert not same_bits(before, w.weights())
    for _ in range(4):
        with pytest.raises(RuntimeError, match=r"call scaler\.update\(\) after every"):
            opt.step(w.batch, scaler=s)
    s.update()
    opt.step(w.batch, scaler=s)


def test_a_cancelled_step_leaves_nothing_to_update() -> None:
    w, s = world(torch.float32), scaler()
    opt = steppe.SAM(sgd(w))
    for _ in range(2):
        w.batch.scaled_by(s)()
        opt.first_step(scaler=s)
        opt.cancel_step()
    opt.step(w.batch, scaler=s)
    s.update()


def test_an_optimizer_that_ends_in_an_error_leaves_nothing_to_the_next() -> None:
    """A scaler knows optimizers by their address, which the next one may be given."""
    w, s = world(torch.float32), scaler()

    def fails_later(model, data, calls=[]):  # noqa: B006
        calls.append(None)
        if len(calls) % 2 == 0:
            raise KeyError("out of memory")
        return w.criterion(model(data[0]), data[1])

    for _ in range(20):
        opt = steppe.SAM(sgd(w))
        with pytest.raises(KeyError):
            opt.step(steppe.Batch(w.model, fails_later, (w.x, w.y), scaler=s))
        del opt


def test_the_larger_batch_of_n_sam_has_the_scale_of_the_step() -> None:
    """Also none, where the step has none."""
    ours, theirs = world(), world()
    rule = steppe.Rule(steppe.OnFull(), steppe.Unnormalised())
    a = steppe.SharpnessAware(sgd(ours), rule, full=ours.full.scaled_by(scaler()))
    b = steppe.SharpnessAware(sgd(theirs), rule, full=theirs.full)
    a.step(ours.batch)
    b.step(theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


def test_grad_scaler_cannot_finish_a_step_of_unscaled_gradients() -> None:
    w, s = world(torch.float32), scaler()
    opt = steppe.SAM(sgd(w))
    before = w.weights()
    opt.backward(w.batch, scaler=s)
    with pytest.raises(RuntimeError, match="knows one pass of a step's several"):
        s.step(opt)
    assert same_bits(before, w.weights())


@pytest.mark.parametrize("name", ["SAM", "WSAM", "USAM"])
def test_a_framework_that_unscales_and_steps_by_itself(name: str) -> None:
    """``scaler.step`` is right where gradients were left scaled again, and refused where they were not."""
    ours, theirs, s = world(), world(), scaler()
    a = getattr(steppe, name)(sgd(ours), rho=0.1)
    b = getattr(steppe, name)(sgd(theirs), rho=0.1)
    for batch, plain in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.backward(batch.scaled_by(s), rescale=True)
        s.unscale_(a)
        s.step(a)
        s.update()
        b.step(plain)
    assert same_bits(ours.weights(), theirs.weights())
    before = ours.weights()
    a.backward(ours.batch, scaler=s)
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        s.step(a)
    assert same_bits(before, ours.weights())
