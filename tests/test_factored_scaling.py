"""Micro-batches in shared passes under a GradScaler: the serial loop's numbers, its skips, and float16."""

import copy

import pytest
import torch
from torch import nn

import steppe
from steppe import Micro, Reweighted, Rule, SharpnessAware
from steppe.factored import gradient_statistics
from steppe.factored.engine import SharedPasses
from tests.cases import flat, same_bits, scaler, sgd, sgdm
from tests.factored_models import EXAMPLES, Example, hold, loss
from tests.models import Faulty
from tests.test_factored import ByHand, N


def trained(example: Example, make, scale: float | None, dtype=torch.float64, steps: int = 2):
    """Weights and optimizer after some steps; the scale is no power of two, so that it shows where it is left in."""
    model = example.model(dtype)
    opt, s = make(model), None if scale is None else scaler(scale)
    for k in range(steps):
        opt.step(example.batch(model, N, dtype, seed=k).scaled_by(s))
        if s is not None:
            s.update()
    return flat(model), opt


METHODS = {
    "SAM": lambda b, m, p: steppe.SAM(b, 0.3, m=m, parallel=p),
    "USAM": lambda b, m, p: steppe.USAM(b, 0.3, m=m, parallel=p),
    "WSAM": lambda b, m, p: steppe.WSAM(b, 0.3, 0.8, m=m, parallel=p),
}


@pytest.mark.parametrize(("method", "m"), [("SAM", 5), ("USAM", 5), ("WSAM", 1), ("WSAM", 5), ("WSAM", N)])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_scaled_loss_equals_the_serial_loop(name: str, method: str, m: int) -> None:
    ours, opt = trained(EXAMPLES[name], lambda model: METHODS[method](sgdm(model), m, True), 1000.0)
    theirs, serial = trained(EXAMPLES[name], lambda model: METHODS[method](sgdm(model), m, False), 1000.0)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()  # the scaler's own arithmetic is float32
    for number in ("loss", "loss_adv", "g_norm", "eps_norm"):
        assert float(getattr(opt.telemetry, number)) == pytest.approx(
            float(getattr(serial.telemetry, number)), rel=1e-6
        )
    assert (opt.telemetry.forwards, opt.telemetry.backwards) == (2, 2)
    exact, _ = trained(EXAMPLES[name], lambda model: METHODS[method](sgdm(model), m, True), 1024.0)
    plain, _ = trained(EXAMPLES[name], lambda model: METHODS[method](sgdm(model), m, False), None)
    assert (exact - plain).norm() <= 1e-10 * plain.norm()


@pytest.mark.parametrize("m", [None, 1, 5])
@pytest.mark.parametrize("name", ["mlp", "gpt", "resnet"])
def test_rw_sam_of_a_scaled_loss_has_exact_norms(name: str, m: int | None) -> None:
    def make(parallel):
        def made(model):
            rule = Rule(Reweighted(3.0) if parallel else Reweighted(3.0, ByHand()), combine=steppe.Weighted(0.8))
            return SharpnessAware(sgdm(model), rule if m is None else Micro(m, rule), 0.3, parallel=parallel)

        return made

    ours, opt = trained(EXAMPLES[name], make(True), 1024.0)
    theirs, _ = trained(EXAMPLES[name], make(False), None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert opt.telemetry.forwards <= 3


def test_statistics_of_a_scaled_loss() -> None:
    model = EXAMPLES["gpt"].model(torch.float64)
    batch = EXAMPLES["gpt"].batch(model, N, torch.float64)
    expected, s = gradient_statistics(batch, m=5), scaler(1000.0)
    state = s.state_dict()
    found = gradient_statistics(batch.scaled_by(s), m=5)
    for name in ("norms", "g_norm", "trace", "signal_to_noise"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0)
    assert s.state_dict() == state
    trace = gradient_statistics(batch).trace
    opt = steppe.SAM(sgdm(model), 0.1, m=4, gradient_noise=True)
    opt.step(batch, scaler=s)
    torch.testing.assert_close(opt.telemetry.trace_V, trace, rtol=1e-6, atol=0)


# ---- overflows


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", ["SAM", "USAM", "WSAM", "RWSAM"])
def test_an_overflow_in_either_pass_backs_off(name: str, at: int) -> None:
    torch.manual_seed(0)
    model, s = Faulty(how=torch.inf), scaler()
    opt = getattr(steppe, name)(torch.optim.AdamW(model.parameters(), lr=0.1), m=4, parallel=True)
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y, scaler=s)
    for _ in range(3):  # past the second rehearsal
        opt.step(batch)
        s.update()
    before, state = [p.detach().clone() for p in model.parameters()], copy.deepcopy(opt.state_dict())
    model.fail_at = (model.calls + at,)
    opt.step(batch)
    s.update()
    assert model.calls == model.fail_at[0] + 2 - at  # both passes, and no serial loop
    assert same_bits(before, list(model.parameters()))
    assert opt.telemetry.was_skipped
    assert s.get_scale() == 512.0
    for p, kept in state["state"].items():
        assert all(torch.equal(v, opt.state_dict()["state"][p][k]) for k, v in kept.items())
    opt.step(batch)
    s.update()
    assert not opt.telemetry.was_skipped
    assert not same_bits(before, list(model.parameters()))
    assert opt.telemetry.forwards == 2


@pytest.mark.parametrize("where", ["look", "see"])
def test_an_overflow_of_one_gradient_alone_backs_off(where: str) -> None:
    """The losses are finite, and one example's gradient is not: only the scaler can say so."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, spoils):
            ctx.spoils = spoils
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            g = g.clone()
            if ctx.spoils:
                g[3] = torch.inf
            return g, None

    torch.manual_seed(0)
    model, s, spoilt = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), scaler(), []

    def spoiling(model, data):
        out = Spoil.apply(model(data[0]), bool(spoilt) and spoilt.pop(0))
        return nn.functional.cross_entropy(out, data[1], reduction="none")

    opt = steppe.SAM(sgd(model), m=4, parallel=True)
    batch = steppe.Batch(model, spoiling, (torch.randn(N, 5), torch.randint(3, (N,))), scaler=s)
    for _ in range(3):
        opt.step(batch)
        s.update()
    before = flat(model).clone()
    spoilt += [where == "look", where == "see"]
    opt.step(batch)
    s.update()
    assert opt.telemetry.was_skipped
    assert s.get_scale() == 512.0
    assert torch.equal(before, flat(model))


def test_norms_that_overflow_alone_back_off() -> None:
    """Squares of scaled gradients pass float32 long before the gradients do: without a word the scale would stay."""
    torch.manual_seed(0)
    model, s = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), scaler(2.0**80)
    opt = steppe.SAM(sgd(model), m=4, parallel=True)
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y, scaler=s)
    for _ in range(40):
        opt.step(batch)
        s.update()
    assert 0 < opt.telemetry.skipped < 30
    assert opt.telemetry.steps == 40 - opt.telemetry.skipped


def test_a_forgotten_update_is_noticed_and_says_nothing_of_the_model() -> None:
    model = EXAMPLES["mlp"].model(torch.float64)
    batch, s = EXAMPLES["mlp"].batch(model, N, torch.float64), scaler(1000.0)
    opt = steppe.SAM(sgdm(model), 0.3, m=4)
    opt.step(batch, scaler=s)
    before = flat(model).clone()
    for _ in range(5):
        with pytest.raises(RuntimeError, match=r"call scaler\.update\(\) after every"):
            opt.step(batch, scaler=s)
    assert torch.equal(before, flat(model))
    s.update()
    opt.step(batch, scaler=s)
    assert opt.telemetry.forwards == 2


# ---- float16


def half(model, data):
    with torch.autocast("cpu", torch.float16):
        return loss(model, data).float()


@pytest.mark.parametrize("whole", [True, False, None])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("name", ["mlp", "vit", "gpt", "resnet"])
def test_autocast_float16(name: str, m: int, whole: bool | None, monkeypatch) -> None:
    """Near the serial loop in float32, as near as the serial loop in float16 is."""
    hold(whole, monkeypatch)
    example, updates = EXAMPLES[name], []
    for parallel, kind in ((True, half), (False, half), (False, loss)):
        model, s = example.model(torch.float32), scaler(2.0**10)
        before = flat(model).clone()
        opt = steppe.SAM(sgd(model), 0.3, m=m, parallel=parallel)
        opt.step(steppe.Batch(model, kind, example.batch(model, N, torch.float32).data, scaler=s))
        assert not opt.telemetry.was_skipped
        updates.append(flat(model) - before)
    ours, theirs, exact = updates
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm()
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.999


@pytest.mark.parametrize("name", ["RWSAM", "SAM"])
def test_products_of_float16_factors_do_not_overflow(name: str) -> None:
    """Inputs of size 60 in 256 columns: their inner products pass 65504."""
    updates = []
    for parallel, autocast in ((True, True), (False, False)):
        torch.manual_seed(0)
        model, s = nn.Sequential(nn.Linear(256, 300), nn.Tanh(), nn.Linear(300, 3)), scaler(2.0**8)
        with torch.no_grad():
            model[0].weight.mul_(0.01)
        x, y = 60 * torch.randn(N, 256), torch.randint(3, (N,))

        def losses(model, data, autocast=autocast):
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").float()

        before = flat(model).clone()
        rule = Rule(Reweighted(0.1, steppe.Exact() if parallel else ByHand())) if name == "RWSAM" else Rule()
        opt = SharpnessAware(sgd(model), Micro(2, rule), 0.1, parallel=parallel)
        opt.step(steppe.Batch(model, losses, (x, y), scaler=s if parallel else None))
        assert not opt.telemetry.was_skipped
        assert torch.isfinite(torch.as_tensor(opt.telemetry.g_norm))
        updates.append(flat(model) - before)
    assert torch.cosine_similarity(*updates, dim=0) > 0.999


def test_a_gradient_that_float16_cannot_hold_unscaled_is_rehearsed_and_used() -> None:
    """Of size 1e-7 and less, which float16 rounds to nothing: only the scale keeps it."""
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model, s = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), scaler(2.0**18)

        def losses(model, data):
            with torch.autocast("cpu", torch.float16):
                out = model(data[0])
            return 1e-4 * nn.functional.cross_entropy(out.float(), data[1], reduction="none")

        before = flat(model).clone()
        opt = steppe.SAM(sgd(model, lr=1e4), 0.1, m=16, parallel=parallel)
        opt.step(steppe.Batch(model, losses, (torch.randn(256, 16), torch.randint(4, (256,))), scaler=s))
        found.append(flat(model) - before)
    assert torch.cosine_similarity(*found, dim=0) > 0.999


@pytest.mark.parametrize("name", ["SAM", "WSAM", "RWSAM"])
def test_float16_finds_its_scale_in_shared_passes(name: str) -> None:
    """From one at which every gradient overflows: the rehearsals find one of their own, and leave the scaler alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    opt = getattr(steppe, name)(sgdm(model), 0.05, m=8, parallel=True)
    s, x, y = scaler(2.0**30), torch.randn(64, 16), torch.randint(4, (64,))
    batch, losses = steppe.Batch(model, autocast_loss, (x, y), scaler=s), []
    state = s.state_dict()
    assert not SharedPasses(True).entry(opt._stepper.oracle(batch), batch).plan.reason
    assert s.state_dict() == state
    for _ in range(40):
        losses.append(float(opt.step(batch)))
        s.update()
    assert 0 < opt.telemetry.skipped < 20
    assert s.get_scale() < 2.0**24
    assert losses[-1] < 0.3 * losses[0]
    assert opt.telemetry.forwards == 2


def autocast_loss(model, data):
    with torch.autocast("cpu", dtype=torch.float16):
        return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").float()
