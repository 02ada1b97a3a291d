"""Properties that every row of the table has."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steppe
from steppe.engine import sampling
from steppe.factored import gradients
from tests.cases import (
    BASES,
    CASES,
    METHODS,
    Case,
    N,
    assert_close,
    assert_equal_states,
    each_case,
    each_case_and_base,
    optimizer,
    same_bits,
    sgd,
    sgdm,
    world,
)
from tests.models import Branches, Faulty, mlp

EVALUABLE = {name: getattr(steppe, name) for name in steppe.__all__}


def run(opt, batches):
    return [float(opt.step(batch)) for batch in batches]


@each_case
def test_weights_do_not_move_when_lr_is_zero(case: Case) -> None:
    w = world(torch.float32)
    before, places = w.weights(), [p.data_ptr() for p in w.parameters()]
    opt = case.make(sgd(w, lr=0.0), w, 0.3)
    run(opt, w.batches(3))
    assert same_bits(before, w.parameters())
    assert [p.data_ptr() for p in w.parameters()] == places


@each_case
@pytest.mark.usefixtures("rehearsed_once")
def test_an_exception_in_any_forward_leaves_weights_and_state(case: Case) -> None:
    w = world(torch.float32, Faulty)
    opt = optimizer(case, w)
    opt._stepper.parallel = opt._stepper.parallel is True  # else the serial loop runs after it, and may succeed
    run(opt, w.batches(2))
    w.model.calls = 0
    copied = copy.deepcopy((w, opt))
    copied[1].step(copied[0].batch)  # may rehearse
    copied[1].load_state_dict(copy.deepcopy(opt.state_dict()))
    copied[0].model.calls = 0
    copied[1].step(copied[0].batch)
    forwards = copied[0].model.calls
    assert forwards >= 1
    for error in (RuntimeError("out of memory"), KeyboardInterrupt()):
        for fail_at in range(1, forwards + 1):
            before, state = w.weights(), copy.deepcopy(opt.state_dict())
            w.model.calls, w.model.fail_at, w.model.how = 0, (fail_at,), error
            with pytest.raises(type(error)):
                opt.step(w.batch)
            assert same_bits(before, w.parameters())
            assert all(p.requires_grad for p in w.parameters())
            assert_equal_states(opt.state_dict(), state)
    w.model.fail_at = ()
    assert opt.step(w.batch).isfinite()


@each_case_and_base
def test_rho_zero_is_the_base_optimizer(case: Case, base: str) -> None:
    ours, theirs = world(), world()
    opt, plain = optimizer(case, ours, base, rho=0.0), BASES[base](theirs.parameters())
    for a, b in zip(ours.batches(5), theirs.batches(5), strict=True):
        assert opt.step(a) == plain.step(b)
        assert (opt.telemetry.forwards, opt.telemetry.backwards) == (1, 1)
    assert same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if not c.selects], ids=lambda case: case.name)
def test_a_vanishing_rho_tends_to_the_base_optimizer(case: Case) -> None:
    ours, theirs = world(), world()
    opt, plain = optimizer(case, ours, "sgd", rho=1e-9), BASES["sgd"](theirs.parameters())
    if case.name.endswith("LookSAM"):
        opt._stepper.rule = opt.rule.rule  # between its SAM steps it adds what was remembered, at full length
    if case.name.endswith("SANER"):
        pytest.skip("half of the entries are smaller at w + eps, however short eps is")
    if case.name == "X-SAM":
        pytest.skip("its update has the length 1")
    for a, b in zip(ours.batches(4), theirs.batches(4), strict=True):
        opt.step(a)
        plain.step(b)
    assert_close(ours, theirs, atol=1e-7)


@each_case
def test_passes_are_as_documented(case: Case) -> None:
    w = world(model=Faulty)
    opt = optimizer(case, w)
    opt.step(w.batch)
    seen = opt.telemetry
    assert (seen.forwards, seen.backwards) == pytest.approx(case.passes)
    assert seen.passes == pytest.approx((case.passes[0] + 2 * case.passes[1]) / 3)


@each_case
def test_resume_is_bit_identical(case: Case) -> None:
    ours = world(torch.float32)
    opt = optimizer(case, ours, "adam")
    run(opt, ours.batches(5)[:3])
    file = io.BytesIO()
    torch.save({"model": ours.model.state_dict(), "optimizer": opt.state_dict()}, file)
    losses = run(opt, ours.batches(5)[3:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = world(torch.float32, seed=1)
    resumed = optimizer(case, again, "adam")
    again.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert run(resumed, again.batches(5)[3:]) == losses
    assert same_bits(ours.parameters(), again.parameters())
    assert_equal_states(opt.state_dict(), resumed.state_dict())


@each_case
def test_copies_go_the_same_way_by_themselves(case: Case) -> None:
    ours = world(torch.float32)
    opt = optimizer(case, ours)
    run(opt, ours.batches(5)[:3])
    before = ours.weights()
    copies = [copy.deepcopy((ours, opt)), pickle.loads(pickle.dumps((ours, opt)))]
    losses = run(opt, ours.batches(5)[3:])
    for theirs, twin in copies:
        assert type(twin) is type(opt)
        assert same_bits(before, theirs.parameters())
        assert run(twin, theirs.batches(5)[3:]) == losses
        assert same_bits(ours.parameters(), theirs.parameters())


@each_case
def test_repr_of_the_rule_evaluates_to_the_rule(case: Case) -> None:
    rule = optimizer(case, world()).rule
    assert eval(repr(rule), EVALUABLE) == rule
    assert repr(rule) in repr(optimizer(case, world()))


@each_case
def test_parameters_without_gradient_stay_without(case: Case) -> None:
    w = world(torch.float32)
    unused, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    base = torch.optim.AdamW([*w.parameters(), unused, frozen], lr=0.1, weight_decay=0.5)
    opt = case.make(base, w, 0.1)
    run(opt, w.batches(3))
    for p in (unused, frozen):
        assert torch.equal(p, torch.ones(3))
        assert p.grad is None
        assert not opt.state.get(p)


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
@pytest.mark.parametrize(
    ("case", "pattern"),
    [(c, p) for c in METHODS for p in ([1, 0], [0, 1], [1, 0, 0, 1, 1], [0, 0, 1])]
    + [(c, [1, 0, 0, 1, 1]) for c in CASES if c not in METHODS],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_gradients_that_come_and_go(case: Case, pattern: list[int]) -> None:
    model = lambda: Branches([mlp(), nn.Linear(5, 3)], pattern=[[0, 1] if both else [0] for both in pattern])  # noqa: E731
    w = world(torch.float32, model)
    opt = case.make(torch.optim.Adam(w.parameters(), lr=0.0), w, 0.3)
    opt._stepper.parallel = opt._stepper.parallel and "auto"  # passes that differ cannot be shared
    before = w.weights()
    run(opt, w.batches(6))
    assert same_bits(before, w.parameters())  # nothing stays perturbed
    for state in opt.state.values():
        assert "exp_avg" in state  # Adam found its own state empty at its first step


@each_case
def test_bfloat16_parameters(case: Case) -> None:
    w = world(torch.bfloat16)
    opt = case.make(sgd(w, lr=0.0), w, 0.5)
    before = w.weights()
    if not case.low:
        with pytest.raises(TypeError, match="float32"):
            opt.step(w.batch)
    else:
        assert opt.step(w.batch) < 10
        assert opt.telemetry.eps_norm.dtype == torch.float32
        assert opt.step(w.batch) < 10
    assert same_bits(before, w.parameters())


@each_case
def test_the_loss_returned_is_the_one_at_w(case: Case) -> None:
    w = world()
    opt = optimizer(case, w)
    on = w.full if "NSAM" in case.name or case.name == "n-SAM, sharpest" else w.batch
    expected = on.losses().mean()
    if case.name == "n-SAM, sharpest":
        expected = w.batch.losses().mean()
    if case.name in ("sampled ascent", "sampled ascent, AsyncSAM"):  # its pass at w is over the subset alone
        expected = sampling.batch_of(sampling.drawn(w.batch, 4, 1, 0, 0)[0]).losses().mean()
    torch.testing.assert_close(opt.step(w.batch), expected.detach())


@each_case
def test_a_plain_closure_is_enough_or_refused_before_anything_changes(case: Case) -> None:
    w, calls = world(), []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = w.criterion(w.model(w.x), w.y).mean()
        loss.backward()
        return loss

    opt = optimizer(case, w)
    before, state = w.weights(), copy.deepcopy(opt.state_dict())
    if case.looks_inside:
        with pytest.raises(TypeError, match=r"steppe\.Batch"):
            opt.step(closure)
        assert not calls
        assert same_bits(before, w.parameters())
        assert_equal_states(opt.state_dict(), state)
    else:
        other = world()
        twin = optimizer(case, other)
        assert opt.step(closure) == twin.step(other.batch)
        assert_close(w, other, atol=1e-14)


@each_case
def test_micro_batches_as_large_as_the_batch_change_nothing(case: Case) -> None:
    ours, theirs = world(), world()
    opt, twin = optimizer(case, ours), optimizer(case, theirs)
    twin._stepper.rule = steppe.Micro(N, twin.rule)
    opt._stepper.parallel = twin._stepper.parallel = False
    for a, b in zip(ours.batches(2), theirs.batches(2), strict=True):
        opt.step(a)
        twin.step(b)
    assert same_bits(ours.parameters(), theirs.parameters())


@each_case
@pytest.mark.usefixtures("rehearsed_once")
def test_one_wait_for_the_device_a_step(case: Case, monkeypatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Waits(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point()
            self.n += func in (torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
            self.n += func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool
            return func(*args, **(kwargs or {}))

    looks = []  # on a CPU it is no wait to look before a pass at w + eps too
    at = steppe.Oracle.at
    monkeypatch.setattr(steppe.Oracle, "at", lambda self, *args, **kw: (looks.append(1), at(self, *args, **kw))[1])
    grams = []  # nor to look whether examples cancel
    gram = gradients._grams
    monkeypatch.setattr(gradients, "_grams", lambda gradients: (grams.append(1), gram(gradients))[1])
    for check_finite in (True, False):
        w = world(torch.float32)
        opt = case.make(sgdm(w), w, 0.1)
        opt._stepper.check_finite = check_finite
        opt.step(w.batch)
        looks.clear()
        grams.clear()
        with Waits() as waits:
            opt.step(w.batch)
        assert waits.n == case.waits + len(grams) + (1 + len(looks) if check_finite else 0)
