"""``first_step`` and ``second_step``, the calling convention of the widely copied ``sam.py``."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import steppe
from steppe import Every, Micro, SharpnessAware
from tests.cases import METHODS, MORE_THAN_TWO, Case, beside_bases, optimizer, same_bits, scaler, sgd, sgdm, world

TWO_GRADIENTS = [c for c in METHODS if not c.looks_inside and c.name != "NSAM" and c.name not in MORE_THAN_TWO]
MORE = [c for c in METHODS if c not in TWO_GRADIENTS and c.name != "NSAM"]


def two_calls(opt: SharpnessAware, batch: steppe.Batch, **options: object) -> None:
    batch()
    opt.first_step(zero_grad=True, **options)
    batch()
    opt.second_step(zero_grad=True)


@beside_bases(TWO_GRADIENTS)
def test_two_calls_are_one_step(case: Case, base: str) -> None:
    ours, theirs = world(), world()
    a, b = optimizer(case, ours, base), optimizer(case, theirs, base)
    for mine, yours in zip(ours.batches(4), theirs.batches(4), strict=True):
        two_calls(a, mine)
        b.step(lambda yours=yours: yours())
        assert same_bits(ours.weights(), theirs.weights())
        assert all(p.grad is None for p in ours.parameters())
        if b.telemetry.g_norm is not None:  # a method that takes no gradient at w
            assert torch.equal(torch.as_tensor(a.telemetry.g_norm), torch.as_tensor(b.telemetry.g_norm))
        assert a.telemetry.steps == b.telemetry.steps


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_methods_of_more_than_two_gradients_say_so(case: Case) -> None:
    w = world()
    opt = optimizer(case, w)
    w.batch()
    before, grads = w.weights(), [p.grad.clone() for p in w.parameters()]
    with pytest.raises(TypeError, match=r"call step\(\)"):
        opt.first_step()
    assert same_bits(before, w.parameters())
    assert same_bits(grads, [p.grad for p in w.parameters()])
    opt.step(w.batch)  # not half done


def test_n_sam_takes_its_perturbation_from_its_own_closure() -> None:
    ours, theirs = world(), world()
    a = steppe.NSAM(sgd(ours), rho=0.3, full=ours.full)
    b = steppe.NSAM(sgd(theirs), rho=0.3, full=theirs.full)
    two_calls(a, ours.batch)
    b.step(theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


def test_between_the_calls_the_weights_are_away_and_come_back() -> None:
    w = world()
    opt = steppe.SAM(sgd(w, lr=0.0), rho=0.3)
    before = w.weights()
    w.batch()
    opt.first_step()
    away = torch.cat([(p - q).flatten() for p, q in zip(w.parameters(), before, strict=True)]).norm()
    torch.testing.assert_close(away.detach(), torch.tensor(0.3, dtype=torch.float64))
    assert torch.is_grad_enabled()
    w.batch()
    opt.second_step()
    assert same_bits(before, w.parameters())
    assert all(p.grad is not None for p in w.parameters())  # zero_grad was not asked for


def test_order_of_calls() -> None:
    w = world()
    opt = steppe.WSAM(sgd(w))
    with pytest.raises(RuntimeError, match=r"first_step\(\) before second_step\(\)"):
        opt.second_step()
    w.batch()
    opt.first_step()
    for call in (opt.first_step, lambda: opt.step(w.batch), opt.step, lambda: opt.backward(w.batch)):
        with pytest.raises(RuntimeError, match=r"second_step\(\), or cancel_step\(\)"):
            call()
    before = w.weights()
    opt.cancel_step()
    assert not same_bits(before, w.weights())
    opt.cancel_step()  # nothing to cancel
    opt.step(w.batch)


def test_a_call_without_a_backward_before_it_is_refused() -> None:
    w = world()
    opt = steppe.SAM(sgdm(w))
    with pytest.raises(RuntimeError, match=r"first_step\(\) found no gradients"):
        opt.first_step()
    before = w.weights()
    w.batch()
    opt.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match=r"second_step\(\) found no gradients"):
        opt.second_step()
    assert same_bits(before, w.parameters())
    assert not opt.state
    two_calls(opt, w.batch)


def test_statistics_are_counted_once_also_when_cancelled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    w = world(torch.float32)
    opt = steppe.SAM(sgd(model))
    batch = steppe.Batch.supervised(model, w.criterion, w.x, w.y)
    two_calls(opt, batch)
    steppe.Batch.supervised(plain, w.criterion, w.x, w.y)()
    assert same_bits(list(model.buffers()), list(plain.buffers()))
    batch()
    kept = [b.clone() for b in model.buffers()]
    opt.first_step()
    batch()
    opt.cancel_step()
    assert same_bits(kept, list(model.buffers()))


@pytest.mark.parametrize(("method", "rho"), [(steppe.LookSAM, 0.1), (steppe.SAM, 0.0)])
def test_statistics_are_counted_once_also_where_nothing_moves(method: type, rho: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    plain = copy.deepcopy(model)
    w = world(torch.float32)
    opt = method(sgd(model, lr=0.0), rho=rho)
    for _ in range(2):  # LookSAM's second step takes the gradient at w alone
        two_calls(opt, steppe.Batch.supervised(model, w.criterion, w.x, w.y))
        steppe.Batch.supervised(plain, w.criterion, w.x, w.y)()
    assert same_bits(list(model.buffers()), list(plain.buffers()))


def test_an_error_in_the_second_call_goes_back_too() -> None:
    w = world(torch.float32)
    embedding = nn.Embedding(3, 2, sparse=True)
    opt = steppe.SAM(sgd([*w.parameters(), *embedding.parameters()]))
    before = w.weights()
    w.batch()
    opt.first_step()
    (w.batch.losses().mean() + embedding(torch.tensor([1])).sum()).backward()
    with pytest.raises(TypeError, match="dense gradients") as caught:
        opt.second_step()
    assert same_bits(before, w.parameters()), caught  # while the error, and with it the step, is still held
    w.batch()
    opt.first_step()


@pytest.mark.parametrize("spoil", ["g", "g_adv"])
def test_a_bad_gradient_skips(spoil: str) -> None:
    w = world()
    opt = steppe.SAM(torch.optim.AdamW(w.parameters(), lr=0.1))
    before = w.weights()
    w.batch()
    if spoil == "g":
        next(iter(w.parameters())).grad[0] = torch.nan
    opt.first_step()
    w.batch()
    if spoil == "g_adv":
        next(iter(w.parameters())).grad[0] = torch.inf
    with pytest.warns(UserWarning, match="not finite"):
        opt.second_step()
    assert same_bits(before, w.parameters())
    assert opt.telemetry.skipped == 1
    assert not opt.state


def test_scaled_gradients() -> None:
    ours, theirs = world(), world()
    a = steppe.USAM(sgd(ours), rho=0.1)
    b = steppe.USAM(sgd(theirs), rho=0.1)
    s = scaler(512.0)
    for _ in range(2):
        two_calls(a, ours.batch.scaled_by(s), scaler=s)
        s.update()
        two_calls(b, theirs.batch)
    assert same_bits(ours.weights(), theirs.weights())


def test_radius_zero_and_rules_of_rules() -> None:
    w, plain = world(), world()
    opt = steppe.SAM(sgd(w), rho=0.0)
    two_calls(opt, w.batch)
    base = sgd(plain)
    plain.batch()
    base.step()
    assert same_bits(w.weights(), plain.weights())
    for rule in (Micro(4), Every(2, Micro(4)), lambda f: steppe.Update(f.g)):
        opt = SharpnessAware(sgd(w), rule)
        w.batch()
        with pytest.raises(TypeError, match="rules of two gradients"):
            opt.first_step()


def test_copies_are_not_in_the_middle_of_a_step() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    w.batch()
    opt.first_step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        with pytest.raises(RuntimeError, match="before second_step"):
            other.second_step()
    w.batch()
    opt.second_step()


def test_an_optimizer_dropped_half_way_goes_back_and_leaves_no_hook() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    before = w.weights()
    w.batch()
    opt.first_step()
    assert not same_bits(before, w.weights())
    del opt
    gc.collect()
    assert same_bits(before, w.parameters())
    assert not nn.modules.module._global_forward_pre_hooks


def test_hooks_and_schedulers_see_a_step() -> None:
    w, seen = world(), []
    opt = steppe.SAM(sgd(w))
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    two_calls(opt, w.batch)
    schedule.step()  # warns where it has seen no step
    assert opt.param_groups[0]["lr"] == 0.05
    assert seen == ["before", "after"]


class CopiedSAM(torch.optim.Optimizer):
    """The layout of the widely copied sam.py: the weights' copy in its state, the base's state elsewhere."""

    def __init__(self, params, base_optimizer, rho=0.05, adaptive=False, **kwargs) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
        self.base_optimizer.step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_checkpoint_of_the_copied_sam_is_loaded(base: type) -> None:
    w, other = world(), world()
    theirs = CopiedSAM(other.parameters(), base, rho=0.07, lr=0.03)
    other.batch()
    theirs.step()
    opt = steppe.SAM(base(w.parameters(), lr=0.5), rho=0.5)
    with pytest.warns(UserWarning, match=r"a sam\.py that does not save its base optimizer"):
        opt.load_state_dict(theirs.state_dict())
    w.model.load_state_dict(other.model.state_dict())
    assert opt.param_groups[0]["rho"] == 0.07
    assert opt.param_groups[0]["lr"] == 0.03
    assert not opt.state
    before = w.weights()
    opt.step(w.batch)
    assert not same_bits(before, w.weights())
