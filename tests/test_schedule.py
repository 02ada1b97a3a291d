import math

import pytest
import torch

import steppe
from steppe.schedule import Constant, Cosine, Linear, Periodic, ProportionalToLR, Tail, Window
from tests.cases import same_bits, sgd, world


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(0.3), {0: 0.3, 9: 0.3}),
        (Linear(0.1, 0.5, 4), {0: 0.1, 1: 0.2, 4: 0.5, 40: 0.5}),
        (Cosine(0.4, 0.0, 4), {0: 0.4, 1: 0.2 * (1 + math.cos(math.pi / 4)), 2: 0.2, 4: 0.0, 9: 0.0}),
        (Window(0.2, 3, 5), {0: 0, 2: 0, 3: 0.2, 4: 0.2, 5: 0}),
        (Window(Linear(0.0, 1.0, 10), 5), {4: 0, 5: 0.5, 50: 1.0}),
        (Tail(0.2, 40), {0: 0, 35: 0, 36: 0.2, 39: 0.2, 50: 0.2}),
        (Tail(Linear(0.0, 1.0, 10), 10, share=0.25), {7: 0, 8: 0.8, 9: 0.9}),
        (Tail(0.2, 3, share=1), {0: 0.2}),
        (Tail(0.2, 3, share=0.01), {1: 0, 2: 0.2}),
        (Periodic(0.2, 3), {0: 0.2, 1: 0, 2: 0, 3: 0.2}),
        (Periodic(Window(0.2, 2), 2), {0: 0, 1: 0, 2: 0.2, 3: 0, 4: 0.2}),
    ],
)
def test_values(schedule, expected) -> None:
    for step, rho in expected.items():
        assert schedule(step, {}) == pytest.approx(rho)
    assert eval(repr(schedule), vars(steppe.schedule)) == schedule


def test_proportional_to_lr_is_gsams_formula() -> None:
    schedule = ProportionalToLR(0.6, 0.2, 3e-3, 1e-3)
    for lr, rho in ((3e-3, 0.6), (1e-3, 0.2), (2e-3, 0.4), (0.0, 0.0)):
        assert schedule(0, {"lr": lr}) == pytest.approx(rho)
    assert schedule(0, {"lr": torch.tensor(2e-3)}) == pytest.approx(0.4)
    assert ProportionalToLR(0.6, 0.2, 1e-3, 1e-3)(0, {"lr": 5.0}) == 0.6


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Constant(-1.0), "rho"),
        (lambda: Linear(-1.0, 0, 5), "start"),
        (lambda: Linear(0.0, math.nan, 5), "end"),
        (lambda: Cosine(0.0, 1.0, 0), "steps"),
        (lambda: Window(0.1, -1), "start"),
        (lambda: Window(0.1, 5, 4), "stop"),
        (lambda: Window(-0.1, 5), "rho"),
        (lambda: Tail(-0.1, 5), "rho"),
        (lambda: Tail(0.1, 0), "steps"),
        (lambda: Tail(0.1, 5, share=0), "share"),
        (lambda: Tail(0.1, 5, share=1.5), "share"),
        (lambda: Periodic(0.1, 0), "every"),
        (lambda: ProportionalToLR(0.1, 0.0, 1e-3, 1e-2), "lr_min"),
        (lambda: ProportionalToLR(-0.1, 0.0, 1e-3), "rho_max"),
    ],
)
def test_bad_values_name_the_argument(make, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()


def test_before_the_tail_steps_are_those_of_the_base() -> None:
    ours, theirs = world(), world()
    a, b = steppe.SAM(sgd(ours), rho=Tail(0.1, steps=10, share=0.3)), sgd(theirs)
    passes = []
    for k, (mine, other) in enumerate(zip(ours.batches(10), theirs.batches(10), strict=True)):
        a.step(mine)
        passes.append(a.telemetry.passes)
        other()
        b.step()
        assert same_bits(ours.weights(), theirs.weights()) == (k < 7)
    assert passes == [1] * 7 + [2] * 3


def test_outside_the_window_passes_are_really_skipped() -> None:
    ours, calls = world(), []
    forward = ours.model.forward
    ours.model.forward = lambda x: (calls.append(1), forward(x))[1]
    base = sgd(ours)
    opt = steppe.SAM(base, rho=Window(0.1, start=2, stop=4), parallel=False)
    passes = []
    for batch in ours.batches(6):
        calls.clear()
        opt.step(batch)
        assert len(calls) == opt.telemetry.forwards
        passes.append(len(calls))
        assert opt.param_groups[0]["rho"] == opt.telemetry.rho
    assert passes == [1, 1, 2, 2, 1, 1]


def test_gsams_radius_follows_the_scheduler_of_each_group() -> None:
    w = world()
    groups = [{"params": w.parameters()[:2], "lr": 0.2}, {"params": w.parameters()[2:], "lr": 0.1}]
    opt = steppe.GSAM(sgd(groups), rho=ProportionalToLR(0.4, 0.0, 0.2))
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    seen = []
    for batch in w.batches(3):
        opt.step(batch)
        seen.append([g["rho"] for g in opt.param_groups])
        scheduler.step()
    assert seen == [pytest.approx(row) for row in ([0.4, 0.2], [0.2, 0.1], [0.1, 0.05])]


def test_a_group_with_its_own_rho_keeps_it() -> None:
    w = world()
    groups = [{"params": w.parameters()[:2], "rho": 0.5}, {"params": w.parameters()[2:]}]
    opt = steppe.SAM(sgd(groups), rho=Linear(0.0, 0.3, 3))
    seen = []
    for batch in w.batches(4):
        opt.step(batch)
        seen.append([g["rho"] for g in opt.param_groups])
    assert seen == [pytest.approx(row) for row in ([0.5, 0.0], [0.5, 0.1], [0.5, 0.2], [0.5, 0.3])]


def test_a_schedule_resumes_from_the_checkpoint() -> None:
    def make(w):
        return steppe.SAM(sgd(w), rho=Periodic(Linear(0.1, 0.5, 6), 2))

    w = world()
    opt = make(w)
    for batch in w.batches(6)[:3]:
        opt.step(batch)
    again = world(seed=1)
    resumed = make(again)
    again.model.load_state_dict(w.model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for a, b in zip(w.batches(6)[3:], again.batches(6)[3:], strict=True):
        opt.step(a)
        resumed.step(b)
        assert opt.telemetry.rho == resumed.telemetry.rho
        assert opt.telemetry.forwards == resumed.telemetry.forwards
    assert same_bits(w.parameters(), again.parameters())
