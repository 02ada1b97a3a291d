"""Sampled m-SAM: m-SAM in expectation, from a few random micro-batches of the batch."""

import copy
import itertools
from math import comb

import pytest
import torch
from torch import nn

import steppe
from steppe import Micro, Rule, SharpnessAware
from steppe.engine import sampling
from tests.cases import CASES, METHODS, Case, KeepingSGD, N, flat, same_bits, sgd, world
from tests.exact import ExactNorms

RHO = 0.3
PARTS = [c for c in METHODS if c.name not in ("NSAM", "LookSAM", "FSAM", "VaSSO")]


def flat_update(update: steppe.Update) -> torch.Tensor:
    parts = [update.grad, *([] if update.beside is None else [update.beside])]
    return torch.cat([t.flatten() for v in parts for t in v.materialised()])


def update_of(w, rule, **options) -> torch.Tensor:
    base = sgd(w)
    base.__class__ = KeepingSGD  # some read its state
    return flat_update(rule(SharpnessAware(base, rule, RHO, **options)._stepper.oracle(w.batch)))


def draw(monkeypatch, chosen: list[list[int]]) -> None:
    """Take these examples in place of random ones."""
    monkeypatch.setattr(sampling, "drawn", lambda batch, *_: [(batch, torch.tensor(part)) for part in chosen])


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.name)
def test_all_micro_batches_of_a_partition_are_m_sam(case: Case, monkeypatch) -> None:
    w = world()
    rule = case.make(sgd(w), w, RHO).rule
    draw(monkeypatch, [list(range(i, i + 5)) for i in (0, 5)])
    ours, theirs = (update_of(w, r, parallel=False) for r in (Micro(5, rule, sampled=2), Micro(5, rule)))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_micro_batches_of_one_are_m_sam_for_any_draw() -> None:
    w = world()
    for seed in (0, 1):
        ours, theirs = update_of(w, Micro(1, Rule(), sampled=N, seed=seed)), update_of(w, Micro(1, Rule()))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [Rule(), Rule(combine=steppe.Weighted(0.8))], ids=["SAM", "WSAM"])
@pytest.mark.parametrize("k", [1, 2])
def test_mean_and_variance_over_all_draws(rule: Rule, k: int, monkeypatch) -> None:
    """The mean is m-SAM's update, the variance that of k numbers drawn from K without return."""
    w = world()
    parts = [list(range(i, i + 2)) for i in range(0, N, 2)]  # K = 5 micro-batches of a partition
    found = []
    for chosen in itertools.combinations(parts, k):
        draw(monkeypatch, list(chosen))
        found.append(update_of(w, Micro(2, rule, sampled=k)))
    exact = update_of(w, Micro(2, rule), parallel=False)
    draws = torch.stack(found)
    assert len(draws) == comb(5, k)
    torch.testing.assert_close(draws.mean(0), exact, rtol=1e-9, atol=1e-12)
    each = []
    for part in parts:
        draw(monkeypatch, [part])
        each.append(update_of(w, Micro(2, rule, sampled=1)))
    one = torch.stack(each).var(0, unbiased=False).sum()
    torch.testing.assert_close(draws.var(0, unbiased=False).sum(), one / k * (5 - k) / (5 - 1))


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_steps_of_every_method(case: Case) -> None:
    """Steps are repeated by a copy and after a resume; the passes are those of the whole batch and of the sample."""
    w = world()
    opt = case.make(torch.optim.Adam(w.parameters(), lr=0.01), w, RHO)
    opt.rule = Micro(2, opt.rule, sampled=2)
    opt._stepper.parallel = False  # a rehearsal takes longer than all steps
    batches = w.batches(4)
    for batch in batches[:2]:
        opt.step(batch)
    other, again = copy.deepcopy((w, opt))
    saved = copy.deepcopy(opt.state_dict())
    again.load_state_dict(saved)
    theirs = other.batches(4)
    for mine, copied in zip(batches[2:], theirs[2:], strict=True):
        opt.step(mine)
        again.step(copied)
    assert same_bits(w.weights(), other.parameters())
    assert opt.telemetry.skipped == 0


@pytest.mark.parametrize(
    ("k", "parallel", "sizes"),
    [(1, "auto", [2, 8, 2]), (3, "auto", [2, 2, 2, 4, 2, 2, 2]), (1, False, [N, 2, 2]), (2, False, [N, 2, 2, 2, 2])],
)
def test_passes_are_counted_as_they_are_run(k: int, parallel: bool | str, sizes: list[int]) -> None:
    """Where nothing mixes examples the samples are parts of the pass of ``g``."""
    w, calls = world(), []
    w.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    opt = steppe.SAM(sgd(w), RHO, m=2, sampled=k, parallel=parallel)
    for _ in range(4):  # the first three are rehearsed
        calls.clear()
        opt.step(w.batch)
    assert calls == sizes
    assert opt.telemetry.forwards == opt.telemetry.backwards == pytest.approx(sum(sizes) / N)
    assert opt.telemetry.passes == pytest.approx(sum(sizes) / N)


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_g_is_the_same_from_one_pass_and_from_parts(case: Case) -> None:
    """So are the step, its memory and what it reports."""
    ours, theirs = world(), world()
    a, b = (case.make(sgd(w), w, RHO) for w in (ours, theirs))
    a.rule, b.rule = (Micro(3, opt.rule, sampled=2) for opt in (a, b))
    b._stepper.parallel = False
    if case.name == "RWSAM":  # its probe would be a finite difference
        b.rule = Micro(3, Rule(sample=steppe.Reweighted(0.5, ExactNorms())), sampled=2)
    for mine, other in zip(ours.batches(2), theirs.batches(2), strict=True):
        losses = a.step(mine), b.step(other)
        torch.testing.assert_close(*losses)
        for name in ("g_norm", "correction", "eps_norm", "gap"):
            x, y = (getattr(opt.telemetry, name) for opt in (a, b))
            assert (x is None) == (y is None), name
            assert x is None or float(x) == pytest.approx(float(y), rel=1e-7), name
    torch.testing.assert_close(flat(ours.model), flat(theirs.model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sampled", [1, 2])
def test_a_sample_may_be_one_of_the_accumulated_batches(sampled: int) -> None:
    """Its pass is then one of those that make ``g``, whatever mixes examples: 1 + k / K passes, as in the base."""
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    cuts = [torch.arange(a, b) for a, b in ((0, 4), (4, 8), (8, N))]
    mine, other = ([w.batch.subset(on) for on in cuts] for w in (ours, theirs))
    calls: list[int] = []
    ours.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    a, b = steppe.SAM(sgd(ours), 1e-9, m=4, sampled=sampled), sgd(theirs)
    torch.manual_seed(3)
    a.step(mine)
    after = torch.rand(3)
    torch.manual_seed(3)
    steppe.Batches(other)()
    b.step()
    assert torch.equal(after, torch.rand(3))
    assert calls == [4, 4, 2] + [4] * sampled
    assert a.telemetry.passes == pytest.approx(1 + 4 * sampled / N)
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, theirs.model.get_buffer(name)), name
    torch.testing.assert_close(flat(ours.model), flat(theirs.model), rtol=1e-4, atol=1e-5)


def test_the_correction_is_clipped_against_g() -> None:
    """By one factor for the base's gradient and for what moves beside it."""
    for rule in (Rule(), Rule(combine=steppe.Weighted(0.8)), Rule(combine=steppe.Coupled(0.8))):
        w = world()
        g = flat_update(steppe.Plain()(SharpnessAware(sgd(w), Rule(), RHO)._stepper.oracle(w.batch)))
        free = update_of(w, Micro(2, rule, sampled=2))
        plain = torch.cat([g, torch.zeros_like(free[len(g) :])])
        ratio = float((free - plain).norm() / g.norm())
        clipped = update_of(w, Micro(2, rule, sampled=2, clip=0.3 * ratio))
        torch.testing.assert_close(clipped, plain + 0.3 * (free - plain), rtol=1e-8, atol=1e-11)
        same = update_of(w, Micro(2, rule, sampled=2, clip=1.1 * ratio))
        torch.testing.assert_close(same, free, rtol=1e-9, atol=1e-12)
        opt = SharpnessAware(sgd(w), rule, RHO, m=2, sampled=2, clip=0.3 * ratio)
        opt.step(w.batch)
        assert float(opt.telemetry.correction) <= 0.3 * ratio * (1 + 1e-9)


def test_running_mean_and_deviation_of_the_correction() -> None:
    w = world()
    opt = steppe.SAM(sgd(w), RHO, m=2, sampled=1)
    seen = []
    for batch in w.batches(5):
        opt.step(batch)
        seen.append(float(opt.telemetry.correction))
    weights = torch.tensor([0.98**4] + [0.02 * 0.98 ** (4 - i) for i in range(1, 5)], dtype=torch.float64)
    x = torch.tensor(seen, dtype=torch.float64)
    mean = float(weights @ x)
    assert float(opt.telemetry.correction_mean) == pytest.approx(mean)
    assert float(opt.telemetry.correction_deviation) == pytest.approx(float((weights @ (x - mean) ** 2).sqrt()))
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(steppe.Batch.supervised(w.model, w.criterion, w.x * torch.inf, w.y))
    assert float(opt.telemetry.correction_mean) == pytest.approx(mean)


def test_a_base_step_between_keeps_the_running_mean_of_the_correction() -> None:
    w = world()
    opt = steppe.SAM(sgd(w), RHO, m=2, sampled=1)
    opt.step(w.batch)
    before = opt.telemetry
    w.batch()
    with pytest.warns(UserWarning, match="without a closure"):
        opt.step()
    assert opt.telemetry.correction is None
    assert opt.telemetry.correction_mean == before.correction_mean
    assert opt.telemetry.correction_deviation == before.correction_deviation


@pytest.mark.parametrize("parallel", ["auto", False])
def test_a_rule_that_has_taken_g_takes_it_once(parallel: bool | str) -> None:
    w = world()
    opt = steppe.AESAM(sgd(w), RHO, m=2, sampled=1, parallel=parallel)
    opt.step(w.batch)  # SAM, as the first norm is the mean
    assert opt.telemetry.passes == pytest.approx(1 + 2 * 2 / N)


def test_micro_batches_do_not_choose_by_themselves_who_remembers() -> None:
    rule = steppe.WhereSteep(Rule(sample=steppe.Friendly()))
    with pytest.raises(ValueError, match=r"rule must not remember.*Write WhereSteep\(Micro\(\.\.\.\)\)"):
        Micro(2, rule)
    w = world()
    opt = SharpnessAware(sgd(w), rule, RHO, m=2)  # one choice for the batch
    opt.step(w.batch)
    assert opt.rule == steppe.WhereSteep(Micro(2, Rule(sample=steppe.Friendly())))
    assert all("sharpness.friendly" in opt.state[p] for p in w.parameters())


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def test_statistics_and_random_numbers_are_those_of_the_base_optimizer() -> None:
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    a, b = steppe.SAM(sgd(ours), RHO, m=5, sampled=1), sgd(theirs)
    torch.manual_seed(3)
    a.step(ours.batch)
    mine = torch.rand(3)
    torch.manual_seed(3)
    theirs.batch()
    b.step()
    assert torch.equal(mine, torch.rand(3))
    for name, buffer in ours.model.named_buffers():
        assert torch.equal(buffer, theirs.model.get_buffer(name)), name


@pytest.mark.parametrize("rho", [0.0, 1e-12])
@pytest.mark.parametrize(
    ("method", "part"), [(steppe.WSAM, {"m": 5, "sampled": 1}), (steppe.SAM, {"ascent": 5})], ids=["sampled", "ascent"]
)
def test_a_radius_of_zero_is_the_base_step(method: type, part: dict, rho: float) -> None:
    """The passes over a sample draw the same masks, so without a move their difference is nothing; a pass over the
    batch after ascent on a subset draws those of the base's own."""
    ours, theirs = world(torch.float64, noisy), world(torch.float64, noisy)
    a, b = method(sgd(ours), rho, **part), sgd(theirs)
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        torch.manual_seed(3)
        a.step(mine)
        torch.manual_seed(3)
        other()
        b.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0 if rho == 0 else 1e-9, atol=0 if rho == 0 else 1e-9)


def test_a_sample_lies_within_one_accumulated_batch() -> None:
    """With all of their micro-batches it is m-SAM, which does not cross them either."""
    w = world()
    chunks = [w.batch.subset(torch.arange(4)), w.batch.subset(torch.arange(4, N))]
    batch = steppe.Batches(chunks)
    sizes = {len(on) for step in range(20) for _, on in sampling.drawn(batch, 4, 1, 0, step)}
    assert sizes == {4}
    assert sorted(len(on) for _, on in sampling.drawn(batch, 4, 9, 0, 0)) == [2, 4, 4]
    f = SharpnessAware(sgd(w), Rule(), RHO)._stepper.oracle(batch)
    ours = flat_update(Micro(1, Rule(), sampled=N)(f))
    torch.testing.assert_close(ours, update_of(w, Micro(1, Rule())), rtol=1e-9, atol=1e-12)


def test_draws_differ_by_step_and_seed_and_are_uniform() -> None:
    batch = world().batch
    first = [on for seed in (0, 1) for step in range(200) for _, on in sampling.drawn(batch, 2, 1, seed, step)]
    counts = torch.cat(first).bincount() / len(first)
    assert (counts - 0.2).abs().max() < 0.08  # 400 draws: four standard deviations
    again = [on for step in range(200) for _, on in sampling.drawn(batch, 2, 1, 0, step)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))


def test_a_model_that_mixes_examples_is_sampled() -> None:
    w = world(torch.float32, noisy)
    opt = steppe.SAM(sgd(w), RHO, m=5, sampled=1)
    opt.step(w.batch)
    assert opt.telemetry.passes == 2
    assert float(opt.telemetry.gap) == pytest.approx(float(opt.telemetry.gap))


def test_what_is_refused_is_named() -> None:
    w = world()
    with pytest.raises(ValueError, match="sampled needs m="):
        steppe.SAM(sgd(w), sampled=1)
    with pytest.raises(ValueError, match="sampled must be a positive integer, got 0"):
        steppe.SAM(sgd(w), m=2, sampled=0)
    with pytest.raises(ValueError, match="clip needs m= and sampled="):
        steppe.SAM(sgd(w), clip=0.5)
    with pytest.raises(ValueError, match="clip needs sampled="):
        steppe.SAM(sgd(w), m=2, clip=0.5)
    with pytest.raises(ValueError, match="clip must be a number > 0 or None, got 0"):
        steppe.SAM(sgd(w), m=2, sampled=1, clip=0)
    with pytest.raises(TypeError, match="looks inside the batch"):
        steppe.SAM(sgd(w), m=2, sampled=1).step(lambda: w.batch())


def test_the_rule_is_written_as_it_was_made() -> None:
    assert repr(Micro(8, Rule())) == f"Micro(m=8, rule={Rule()!r})"
    rule = Micro(8, Rule(), sampled=2, seed=1, clip=0.5)
    assert eval(repr(rule), vars(steppe)) == rule
    assert len(CASES) > len(PARTS)


def test_an_error_on_a_sample_leaves_the_random_stream_as_one_pass_does() -> None:
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    calls: list[int] = []

    def unlucky(_module: nn.Module, _inputs: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("the second pass over the sample")

    ours.model.register_forward_pre_hook(unlucky)
    opt = steppe.SAM(sgd(ours), RHO, m=5, sampled=1, parallel=False)
    torch.manual_seed(3)
    with pytest.raises(KeyError):
        opt.step(ours.batch)
    mine = torch.rand(3)
    torch.manual_seed(3)
    theirs.batch()
    assert torch.equal(mine, torch.rand(3))
    assert same_bits(ours.weights(), theirs.parameters())
