"""Ascent on a subset: the direction of the perturbation from a few random examples, the gradient of the whole batch."""

import copy
import itertools
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import steppe
from steppe import Every, Micro, OnFull, Rule, SharpnessAware, Subset
from steppe.engine import sampling
from steppe.rule import on_micro_batches
from tests.cases import METHODS, Case, N, assert_equal_states, flat, same_bits, sgd, world
from tests.test_sampled import RHO, draw, noisy, update_of

# no sample, or one that is no gradient on the batch
OTHERS = ("NSAM", "MomentumSAM", "ReweightedSharpness", "FunctionalSAM", "GAM", "LookbehindSAM")
FROM_THE_BATCH = [c for c in METHODS if c.name.split()[0] not in OTHERS]


@dataclass(frozen=True)
class Momentum:
    """A direction from the base's state."""

    declares: ClassVar[steppe.Declaration] = steppe.Declaration(base_state=frozenset({"momentum_buffer"}))

    def __call__(self, f: steppe.Oracle) -> steppe.Vector:
        return f.base_state("momentum_buffer")


def gradient(w, rows: list[int]) -> torch.Tensor:
    loss = w.criterion(w.model(w.x[rows]), w.y[rows]).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, w.parameters())])


def moved_by(w, eps: torch.Tensor):
    """A copy of the world, at ``w + eps``."""
    there = copy.deepcopy(w)
    weights = nn.utils.parameters_to_vector(there.parameters()).detach()
    nn.utils.vector_to_parameters(weights + eps, there.parameters())
    return there


def test_the_direction_is_that_of_the_subset_and_the_gradient_that_of_the_batch(monkeypatch) -> None:
    w, chosen = world(), [1, 4, 7]
    draw(monkeypatch, [chosen])
    d = gradient(w, chosen)
    by_hand = gradient(moved_by(w, RHO * d / d.norm()), list(range(N)))
    torch.testing.assert_close(update_of(w, Rule(Subset(3))), by_hand, rtol=1e-9, atol=1e-12)
    opt = steppe.SAM(sgd(w), RHO, ascent=3)
    before = flat(w.model)
    loss = opt.step(w.batch)
    torch.testing.assert_close(flat(w.model), before - 0.1 * by_hand, rtol=1e-9, atol=1e-12)
    w = world()
    torch.testing.assert_close(loss, w.criterion(w.model(w.x[chosen]), w.y[chosen]).mean())
    assert opt.telemetry.gap is None  # the two losses are of different examples
    assert float(opt.telemetry.g_norm) == pytest.approx(float(d.norm()))


@pytest.mark.parametrize("case", FROM_THE_BATCH, ids=lambda case: case.name)
def test_a_subset_of_all_examples_is_the_method(case: Case) -> None:
    ours, theirs = world(), world()
    a, b = (case.make(sgd(w), w, RHO) for w in (ours, theirs))
    a.rule = on_micro_batches(a.rule, ascent=N)
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(mine)
        b.step(other)
    torch.testing.assert_close(flat(ours.model), flat(theirs.model), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", FROM_THE_BATCH, ids=lambda case: case.name)
def test_every_method_takes_it_and_resumes(case: Case) -> None:
    """Steps are repeated by a copy after a resume: the draws depend on the step alone."""
    w = world()
    opt = case.make(torch.optim.Adam(w.parameters(), lr=0.01), w, RHO)
    opt.rule = on_micro_batches(opt.rule, ascent=2)
    batches = w.batches(4)
    for batch in batches[:2]:
        opt.step(batch)
    other, again = copy.deepcopy((w, opt))
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for mine, copied in zip(batches[2:], other.batches(4)[2:], strict=True):
        opt.step(mine)
        again.step(copied)
    assert same_bits(w.weights(), other.parameters())
    assert_equal_states(opt.state_dict(), again.state_dict())
    assert opt.telemetry.skipped == 0


@pytest.mark.parametrize("m", [1, 3])
def test_the_norm_of_the_direction_is_what_the_docs_say(m: int) -> None:
    """``E norm(d)^2 = norm(g)^2 + tr V / m (n - m) / (n - 1)``, over all subsets; the bound of the factor is met."""
    w = world()
    each = torch.stack([gradient(w, [i]) for i in range(N)])
    g = each.mean(0)
    trace = (each - g).square().sum(1).mean()
    squares = [each[list(s)].mean(0).square().sum() for s in itertools.combinations(range(N), m)]
    expected = g.square().sum() + trace / m * (N - m) / (N - 1)
    torch.testing.assert_close(torch.stack(squares).mean(), expected)
    small = torch.zeros(N, 2, dtype=torch.float64)
    small[:, 0] = torch.tensor([1.0, -1.0] * (N // 2))  # all noise: norm(g)^2 has the mean tr V / n over batches
    trace = small.square().sum(1).mean()
    assert float(((trace / m) / (trace / N)).sqrt()) == pytest.approx((N / m) ** 0.5)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [(steppe.SAM, [2, N]), (steppe.ASAM, [2, N]), (steppe.WSAM, [N, 2, N]), (steppe.GSAM, [N, 2, N])],
)
def test_passes_are_counted_as_they_are_run(method: type[SharpnessAware], sizes: list[int]) -> None:
    w, calls = world(), []
    w.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    opt = method(sgd(w), RHO, ascent=2)
    opt.step(w.batch)
    assert calls == sizes
    assert opt.telemetry.passes == opt.telemetry.forwards == pytest.approx(sum(sizes) / N)
    plain, cosine = (method(sgd(w), RHO, ascent=2, cosine=cosine) for cosine in (False, True))
    plain.step(w.batch)
    cosine.step(w.batch)
    assert cosine.telemetry.passes == plain.telemetry.passes  # it keeps a gradient that is there
    assert (cosine.telemetry.cosine is None) == (plain.telemetry.cosine is None) == (len(sizes) == 2)


@pytest.mark.parametrize("method", [steppe.SAM, steppe.WSAM])
def test_statistics_see_one_pass_over_the_batch_and_random_numbers_go_on_as_in_the_base(method) -> None:
    """That pass is at ``w`` where there is one, else at ``w + eps``."""
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    a, b = method(sgd(ours), RHO, ascent=5), sgd(theirs)
    at_w, seen = ours.weights(), []
    ours.model.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), ours.weights())))
    torch.manual_seed(3)
    a.step(ours.batch)
    mine = torch.rand(3)
    torch.manual_seed(3)
    if method is steppe.SAM:
        with torch.no_grad():
            for p, there in zip(theirs.parameters(), seen[-1][1], strict=True):
                p.copy_(there)
    theirs.batch()
    b.step()
    assert torch.equal(mine, torch.rand(3))
    assert [n for n, _ in seen] == ([5, N] if method is steppe.SAM else [N, 5, N])
    assert not same_bits(seen[-1][1], at_w)
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, theirs.model.get_buffer(name)), name


def test_the_subset_lies_within_one_accumulated_batch(monkeypatch) -> None:
    w = world()
    chunks = [w.batch.subset(torch.arange(4)), w.batch.subset(torch.arange(4, N))]
    found = []
    real = sampling.drawn
    monkeypatch.setattr(sampling, "drawn", lambda *a: found.extend(real(*a)) or found[-1:])
    opt = steppe.SAM(sgd(w), RHO, ascent=3)
    for _ in range(4):
        opt.step(chunks)
        assert opt.telemetry.passes == pytest.approx(1.3)
    assert {id(chunk) for chunk, _ in found} == set(map(id, chunks))
    assert all(len(on) == 3 and on.max() < len(chunk) for chunk, on in found)


def test_what_is_refused_is_named() -> None:
    w = world()
    with pytest.raises(ValueError, match="ascent must be None beside m="):
        steppe.SAM(sgd(w), m=2, ascent=2)
    with pytest.raises(ValueError, match=r"ascent=2: sample must be a gradient on the batch, .* got OnFull\(\)"):
        steppe.NSAM(sgd(w), full=w.full, ascent=2)
    with pytest.raises(ValueError, match="sample must be a gradient on the batch"):
        Subset(2, Momentum())
    with pytest.raises(ValueError, match="ascent must be None for a rule that is no Rule"):
        steppe.ReweightedSharpness(sgd(w), ascent=2)
    with pytest.raises(ValueError, match="ascent must be None for a rule that is no Rule"):
        SharpnessAware(sgd(w), steppe.Plain(), ascent=2)
    with pytest.raises(ValueError, match="ascent=0: m must be a positive integer, got 0"):
        steppe.SAM(sgd(w), ascent=0)
    for inner in (Subset(3), steppe.Friendly(of=OnFull())):
        with pytest.raises(ValueError, match="sample must be a gradient on the batch"):
            Subset(2, inner)
    before = w.weights()
    with pytest.raises(TypeError, match="looks inside the batch"):
        steppe.SAM(sgd(w), ascent=2).step(lambda: w.batch())
    assert same_bits(before, w.parameters())


def test_the_rule_is_written_as_it_was_made() -> None:
    rule = on_micro_batches(Every(2, Rule()), ascent=4)
    assert rule == Every(2, Rule(Subset(4)))
    assert eval(repr(rule), vars(steppe)) == rule
    assert Micro(4, Rule(Subset(2))).declares.parts


def test_a_cosine_that_is_not_there_changes_nothing() -> None:
    """SAM on a subset takes no gradient of the batch at ``w``; ``cosine=True`` must not add one."""
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    a = steppe.SAM(sgd(ours), RHO, ascent=2, cosine=True)
    b = steppe.SAM(sgd(theirs), RHO, ascent=2)
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        torch.manual_seed(3)
        mine_loss = a.step(mine)
        torch.manual_seed(3)
        assert torch.equal(mine_loss, b.step(other))
        assert a.telemetry.passes == b.telemetry.passes
        assert a.telemetry.cosine is None
    assert same_bits(ours.parameters(), theirs.parameters())
    assert all(torch.equal(p, q) for p, q in zip(ours.model.buffers(), theirs.model.buffers(), strict=True))
