"""``backward(closure)`` and then ``step()`` is ``step(closure)``, with room between for what loops do to gradients."""

import copy
import warnings

import pytest
import torch
from torch import nn

import steppe
from tests.cases import BASES, Case, each_base, each_case_and_base, optimizer, same_bits, sgd, world


@each_case_and_base
def test_backward_and_step_are_one_step(case: Case, base: str) -> None:
    ours, theirs = world(), world()
    a, b = optimizer(case, ours, base), optimizer(case, theirs, base)
    for split, whole in zip(ours.batches(2), theirs.batches(2), strict=True):
        before = ours.weights()
        loss = a.backward(split)
        assert same_bits(before, ours.parameters())
        seen = a.telemetry
        assert seen.steps == b.telemetry.steps
        assert a.step() is None
        assert torch.equal(loss, b.step(whole))
        assert same_bits(ours.parameters(), theirs.parameters())
        assert a.telemetry.steps == b.telemetry.steps
        assert (seen.forwards, seen.backwards) == (b.telemetry.forwards, b.telemetry.backwards)
    mine, yours = a.state_dict(), b.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert all(
        torch.equal(v, yours["state"][p][k]) for p, s in mine["state"].items() for k, v in s.items() if v is not None
    )


def test_what_is_done_to_the_gradients_between_counts() -> None:
    w, other = world(), world()
    opt = steppe.SAM(sgd(w), rho=0.1)
    steppe.SAM(sgd(other), rho=0.1).step(other.batch)  # leaves g_adv
    g_adv = [p.grad for p in other.parameters()]
    before = w.weights()
    opt.backward(w.batch)
    assert same_bits([p.grad for p in w.parameters()], g_adv)
    norm = nn.utils.clip_grad_norm_(w.parameters(), 1e-3)
    torch.testing.assert_close(norm, opt.telemetry.g_adv_norm)
    opt.step()
    for p, q, g in zip(w.parameters(), before, g_adv, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.1 * g * 1e-3 / (norm + 1e-6))


def test_memory_is_that_of_the_passes_and_not_of_clipped_gradients() -> None:
    rule = steppe.Rule(
        sample=steppe.Friendly(0.5, 0.0), combine=steppe.Weighted(0.5)
    )  # remembers g, feeds g to the base
    w = world()
    opt = steppe.SharpnessAware(sgd(w), rule, 0.1)
    opt.backward(w.batch)
    g = [p.grad.clone() for p in w.parameters()]
    nn.utils.clip_grad_norm_(w.parameters(), 1e-6)
    opt.step()
    kept = [next(v for k, v in opt.state[p].items() if k.startswith("sharpness.")) for p in w.parameters()]
    assert same_bits(kept, g)


def test_a_step_without_finite_gradients_says_so_in_the_gradients_and_moves_nothing() -> None:
    w = world()
    opt = steppe.WSAM(torch.optim.AdamW(w.parameters(), lr=0.1))
    before = w.weights()

    def closure():
        loss = w.batch() * float("inf")
        for p in w.parameters():
            p.grad.mul_(float("inf"))
        return loss

    with pytest.warns(UserWarning, match="not finite"):
        opt.backward(closure)
    assert all(p.grad.isnan().all() for p in w.parameters())
    opt.step()
    assert same_bits(before, w.parameters())
    assert (opt.telemetry.skipped, opt.telemetry.steps) == (1, 0)
    assert not opt.state


def test_backward_again_is_refused_until_the_gradients_are_dropped() -> None:
    """An accumulation loop would keep the last micro-batch alone."""
    ours, theirs = world(), world()
    a, b = (steppe.SAM(sgd(w)) for w in (ours, theirs))
    first, second = ours.batches(2)
    for drop in (a.zero_grad, lambda: a.zero_grad(set_to_none=False), ours.model.zero_grad):
        a.backward(first)
        kept = [p.grad.clone() for p in ours.parameters()]
        with pytest.raises(RuntimeError, match=r"optimizer\.backward\(\[batch, \.\.\.\]\).*zero_grad\(\)"):
            a.backward(second)
        assert same_bits(kept, [p.grad for p in ours.parameters()])
        drop()
    a.backward(second)
    a.step()
    b.step(theirs.batches(2)[1])
    assert same_bits(ours.parameters(), theirs.parameters())
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        a.step()  # nothing is left to finish


def test_a_step_with_a_closure_is_refused_while_gradients_wait() -> None:
    """Else ``step()`` after it would move by the waiting step's memory and the other's gradients."""
    w = world()
    opt = steppe.FSAM(sgd(w))
    opt.backward(w.batch)
    before = w.weights()
    for again in (lambda: opt.step(w.batch), opt.first_step):
        with pytest.raises(RuntimeError, match=r"gradients of backward\(\) wait for step\(\)"):
            again()
    assert same_bits(before, w.parameters())
    opt.zero_grad()
    opt.step(w.batch)
    assert opt.telemetry.steps == 1
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        opt.step()  # nothing is left to finish


def test_backward_again_after_a_step_that_is_skipped() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    bad = steppe.Batch.supervised(w.model, w.criterion, w.x * torch.inf, w.y)
    with pytest.warns(UserWarning, match="not finite"):
        opt.backward(bad)
    opt.backward(w.batch)
    opt.step()
    assert opt.telemetry.steps == 1


def test_an_error_in_the_passes_leaves_nothing_to_finish() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    before, calls = w.weights(), []

    def closure():
        calls.append(None)
        if len(calls) == 4:
            raise KeyError("second pass")
        return w.batch()

    opt.backward(closure)
    opt.zero_grad()
    with pytest.raises(KeyError):
        opt.backward(closure)
    assert same_bits(before, w.parameters())
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        opt.step()


def test_copies_have_nothing_to_finish() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    opt.backward(w.batch)
    _, other = copy.deepcopy((w, opt))
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()


@each_base
@pytest.mark.parametrize("name", ["SAM", "WSAM", "FSAM", "LookSAM"])
def test_gradients_dropped_between_are_a_step_of_nothing(name: str, base: str) -> None:
    """As after an ordinary backward: neither weights nor memory of a parameter without a gradient change."""
    w, other = world(), world()
    a = getattr(steppe, name)(BASES[base](w.parameters()), rho=0.1)
    b = getattr(steppe, name)(BASES[base](other.parameters()), rho=0.1)
    before = w.weights()
    a.backward(w.batch)
    a.zero_grad()
    a.step()
    assert same_bits(before, w.parameters())
    assert not any(a.state.values())
    a.param_groups[0]["sharpness_step"] = 0
    for ours, theirs in zip(w.batches(3), other.batches(3), strict=True):  # what follows is a beginning
        a.step(ours)
        b.step(theirs)
    assert same_bits(w.parameters(), other.parameters())


@pytest.mark.parametrize("to", ["wrapper", "base"])
def test_a_group_added_between_waits_for_the_next_step(to: str) -> None:
    w, other = world(), world()
    a = steppe.WSAM(sgd(w))
    b = steppe.WSAM(sgd(other))
    late = nn.Parameter(torch.ones(2, dtype=torch.float64))
    a.backward(w.batch)
    (a if to == "wrapper" else a.base).add_param_group({"params": [late]})
    a.step()
    b.step(other.batch)
    assert same_bits(w.parameters(), other.parameters())
    assert torch.equal(late.detach(), torch.ones(2, dtype=torch.float64))
