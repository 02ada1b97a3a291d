"""What happens around the passes of a step: what is freed, shared, refused and put back."""

import copy
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import steppe
from steppe import Every, Micro, Oracle, Rule, SharpnessAware, Update, Vector
from steppe.pieces.protocol import Declaration, declared
from tests.cases import same_bits, scaler, sgd, world
from tests.exact import ExactNorms


def test_g_is_freed_before_the_base_steps() -> None:
    w = world()
    kept: list[weakref.ref] = []

    @dataclass(frozen=True)
    class Watched:
        def __call__(self, f: Oracle, g_adv: Vector) -> Update:
            kept.extend(weakref.ref(t) for t in f.g.present())
            return Update(g_adv * 1.5 + f.g * 0.5)

    opt = SharpnessAware(sgd(w.model), Rule(combine=Watched()), 0.1)
    alive: list[bool] = []
    opt.base.register_step_pre_hook(lambda *_: alive.append(any(t() is not None for t in kept)))
    opt.step(w.batch)
    assert kept
    assert alive == [False]


def test_a_rule_that_is_dropped_takes_what_it_held_with_it() -> None:
    teacher = nn.Linear(2, 2)
    alive = weakref.ref(teacher)

    def distilled(f: Oracle, teacher: nn.Module = teacher) -> Update:
        return Update(f.g)

    w = world()
    opt = SharpnessAware(sgd(w.model), distilled)
    opt.step(w.batch)
    del opt, distilled, teacher
    assert alive() is None


def test_a_function_that_declares_later_is_heard() -> None:
    def remembers(f: Oracle) -> Update:
        f.remember("x", f.g)
        return Update(f.g)

    w = world()
    with pytest.raises(ValueError, match="'x'"):
        SharpnessAware(sgd(w.model), remembers).step(w.batch)
    remembers.declares = Declaration(remembers=frozenset({"x"}))
    SharpnessAware(sgd(w.model), remembers).step(w.batch)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(sample=steppe.Friendly()),
        Rule(combine=steppe.RememberOrthogonal()),
        Rule(sample=steppe.OnFull(), select=steppe.Sharpest(0.5)),
        Rule(combine=steppe.Weighted(0.8)),
    ],
    ids=["memory of a sample", "memory of a combine", "losses at w", "g"],
)
def test_a_function_may_call_a_template(rule: Rule) -> None:
    ours, theirs = world(), world()
    a = SharpnessAware(sgd(ours.model), lambda f: rule(f), 0.1, full=ours.full)
    b = SharpnessAware(sgd(theirs.model), rule, 0.1, full=theirs.full)
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(mine)
        b.step(other)
    assert same_bits(ours.weights(), theirs.parameters())


def test_a_template_of_ones_own_is_called() -> None:
    @dataclass(frozen=True)
    class Mine(Rule):
        def __call__(self, f: Oracle) -> Update:
            calls.append(1)
            return super().__call__(f)

    calls: list[int] = []
    w = world()
    opt = SharpnessAware(sgd(w.model), Micro(5, Mine()), 0.1)
    opt.step(w.batch)
    assert len(calls) == 2


def test_weights_of_examples_keep_their_choice_of_parameters() -> None:
    """What ``example_norms`` has recorded answers the template alone, not every ``grad(weights=)``."""
    w = world()
    seen: list[list[bool]] = []

    def rule(f: Oracle) -> Update:
        norms = f.example_norms()
        p = torch.softmax(norms, 0)
        seen.append([t is not None for t in f.grad(weights=p, wrt=[True, False] * (len(w.parameters()) // 2)).tensors])
        return Update(f.grad(weights=p))

    reference = world()
    SharpnessAware(sgd(w.model), rule, 0.1).step(w.batch)
    p = torch.softmax(ExactNorms()(SharpnessAware(sgd(reference.model), rule)._stepper.oracle(reference.batch)), 0)
    reference.model.zero_grad()
    (reference.batch.losses() @ p.detach()).backward()
    sgd(reference.model).step()
    assert seen == [[True, False] * (len(w.parameters()) // 2)]
    for ours, theirs in zip(w.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_losses_before_the_norms_of_examples() -> None:
    w = world()

    def rule(f: Oracle) -> Update:
        f.losses()
        f.example_norms()
        return Update(f.g)

    SharpnessAware(sgd(w.model), rule, 0.1).step(w.batch)


def test_a_list_of_batches_with_a_scaler_is_scaled_again() -> None:
    ours, theirs = world(torch.float32), world(torch.float32)
    s = scaler(2.0**10)
    a, b = (steppe.SAM(sgd(w.model), 0.1) for w in (ours, theirs))
    a.backward([ours.batch.scaled_by(s)], rescale=True)
    s.step(a)
    s.update()
    b.step([theirs.batch])
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_gradients_that_were_not_scaled_again_are_refused_by_the_scaler() -> None:
    w = world(torch.float32)
    s = scaler(2.0**10)
    opt = steppe.SAM(sgd(w.model), 0.1)
    opt.backward(w.batch.scaled_by(s))
    before = w.weights()
    with pytest.raises(RuntimeError, match=r"scaler\.step"):
        s.step(opt)
    assert same_bits(before, w.parameters())


def test_a_group_that_the_base_refuses_leaves_the_schedule_alone() -> None:
    w, extra = world(), nn.Parameter(torch.ones(2))
    opt = steppe.SAM(sgd(w.model), rho=lambda step, group: 2.0 + step)
    with pytest.raises(TypeError, match="ordered collections"):
        opt.add_param_group({"params": {extra}, "rho": 0.1})
    opt.add_param_group({"params": [extra]})
    opt.step(w.batch)
    opt.step(w.batch)
    assert [group["rho"] for group in opt.param_groups] == [3.0, 3.0]


def test_a_generator_of_parameters_is_added() -> None:
    w, layer = world(), nn.Linear(2, 2)
    opt = steppe.SAM(sgd(w.model))
    opt.add_param_group({"params": layer.parameters()})
    assert [len(group["params"]) for group in opt.param_groups] == [len(w.parameters()), 2]


def test_a_rule_may_be_replaced() -> None:
    w = world()
    opt = steppe.SAM(sgd(w.model))
    opt.step(w.batch)
    opt.rule = Rule(sample=steppe.Friendly())
    opt.step(w.batch)
    assert all("sharpness.friendly" in state for state in opt.state.values())
    assert opt.base is copy.copy(opt).base
    for bad in ("SAM", Rule(geometry=steppe.Preconditioned())):
        with pytest.raises(TypeError, match=r"rule must be a function|needs a base optimizer that keeps"):
            opt.rule = bad
    assert opt.rule == Rule(sample=steppe.Friendly())


def test_what_is_looked_at_once_is_looked_at_anew_for_another_rule() -> None:
    w = world()
    mean = lambda model, x: model(x).square().mean()  # noqa: E731
    contrast = lambda model, x: (model(x) - model(x).mean(0)).square().mean()  # noqa: E731
    opt = steppe.SAM(sgd(w.model), m=5)
    opt.step(steppe.MeanBatch(w.model, mean, w.x))
    opt.rule = Micro(4)
    with pytest.warns(UserWarning, match="is not the weighted mean of its parts"):
        opt.step(steppe.MeanBatch(w.model, contrast, w.x))


def test_a_rule_of_some_steps_that_needs_examples_is_refused_at_the_first() -> None:
    w = world()
    opt = SharpnessAware(sgd(w.model), Every(2, Rule(), between=Micro(5)), 0.1)
    before = w.weights()
    with pytest.raises(TypeError, match="looks inside the batch"):
        opt.step(lambda: w.batch())
    assert same_bits(before, w.parameters())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_modules_take_steps() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = model(torch.arange(12.0).view(4, 3)).square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    opt.step(closure)
    assert model[1].num_batches_tracked == 2


def test_rules_made_of_rules_say_which_gradients_they_ask_for() -> None:
    assert not declared(Micro(5, Every(2, Rule(), Rule()))).g
    assert declared(Every(2, Rule(combine=steppe.Weighted()))).g

    @dataclass(frozen=True)
    class Unhashable:
        data: list
        declares: ClassVar[Declaration] = Declaration(radial=True)

    assert declared(Unhashable([])).radial
