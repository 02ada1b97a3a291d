"""Random combinations of pieces against the same slots of the reference, on a flat vector."""

import copy
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import steppe
from steppe import Adaptive, Every, Everything, Micro, Rule, SharpnessAware
from tests import reference
from tests.cases import BASES, N, same_bits, sgd, world
from tests.exact import ExactNorms
from tests.reference import Base, Method, Problem, flat


class Piece(NamedTuple):
    """A piece, and what the reference says of it."""

    ours: object
    theirs: object


def pieces(ours, theirs, *values) -> st.SearchStrategy[Piece]:
    """Both built from the same values; a value that is a pair itself gives each its own half."""

    def build(*drawn):
        mine = [v.ours if isinstance(v, Piece) else v for v in drawn]
        yours = [v.theirs if isinstance(v, Piece) else v for v in drawn]
        return Piece(ours(*mine), theirs(*yours) if values else theirs)

    return st.builds(build, *values)


share = st.floats(0.05, 1.0)
plain_samples = st.one_of(
    pieces(steppe.Mean, reference.mean),
    pieces(steppe.Reweighted, reference.reweighted, st.floats(0, 5), pieces(ExactNorms, reference.exact_norms)),
    pieces(steppe.OnFull, reference.on_full),
    pieces(steppe.Centralised, reference.centralised),
    pieces(steppe.Filtered, reference.outstanding, st.floats(0, 0.99)),
)
samples = st.one_of(
    plain_samples,
    pieces(steppe.Friendly, reference.friendly, st.floats(0, 0.9), st.floats(0, 1), plain_samples),
    pieces(steppe.Smoothed, reference.smoothed, share, plain_samples),
)
geometries = st.one_of(
    pieces(steppe.Euclidean, reference.euclidean),
    pieces(steppe.Unnormalised, reference.unnormalised),
    pieces(steppe.Unified, reference.unified, st.floats(0, 1)),
    pieces(lambda eta: Adaptive(eta, Everything()), lambda eta: reference.adaptive(eta, True), st.floats(0, 0.5)),
    pieces(Adaptive, reference.adaptive, st.floats(0, 0.5)),
    pieces(steppe.Fisher, reference.fisher, st.floats(0, 3)),
    pieces(steppe.LossBudget, reference.within_a_budget, st.floats(0, 1)),
)
selects = st.one_of(
    pieces(steppe.All, reference.everything),
    pieces(steppe.Sharpest, reference.sharpest, share),
)
combines = st.one_of(
    pieces(steppe.Perturbed, reference.perturbed),
    pieces(steppe.Weighted, reference.weighted, st.floats(0, 0.95)),
    pieces(steppe.Coupled, reference.coupled, st.floats(0, 0.95)),
    pieces(steppe.SurrogateGap, reference.surrogate_gap, st.floats(0, 1)),
    pieces(steppe.Weighted, reference.weighted_and_clipped, st.floats(0, 0.95), st.floats(0.01, 3)),
    pieces(steppe.Rescaled, reference.as_long_as_g),
)
rules = pieces(Rule, Method, samples, geometries, selects, combines)


relaxed = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@relaxed
@given(rule=rules, m=st.sampled_from([None, 1, 3, 4, N]), rho=st.floats(0.01, 0.5))
def test_any_combination_is_what_its_formulas_say(rule: Piece, m: int | None, rho: float) -> None:
    w = world()
    loss = nn.CrossEntropyLoss(reduction="none")
    problems = [Problem.from_module(w.model, loss, b.data, (w.full_x, w.full_y)) for b in w.batches(3)]
    point, memory, base = flat(w.model), {}, Base("momentum", 0.05, weight_decay=0.01)
    whole = rule.ours if m is None else Micro(m, rule.ours)
    opt = SharpnessAware(BASES["momentum"](w.parameters()), whole, rho, full=w.full)
    for t, (batch, problem) in enumerate(zip(w.batches(3), problems, strict=True)):
        opt.step(batch)
        u, beside, memory = reference.direction(rule.theirs, problem, point, memory, t, rho, m)
        point = base.step(point, u) - 0.05 * beside
        torch.testing.assert_close(flat(w.model), point, rtol=0, atol=1e-7)


@relaxed
@given(
    rule=rules,
    m=st.sampled_from([None, 1, 4, N]),
    k=st.integers(1, 3),
    base=st.sampled_from(sorted(BASES)),
    rho=st.floats(0.0, 0.5),
)
def test_any_combination_resumes_restores_and_reads_back(
    rule: Piece, m: int | None, k: int, base: str, rho: float
) -> None:
    whole = Every(k, rule.ours if m is None else Micro(m, rule.ours))
    assert eval(repr(whole), vars(steppe) | {"ExactNorms": ExactNorms}) == whole
    w = world(torch.float32)
    opt = SharpnessAware(BASES[base](w.parameters()), whole, rho, full=w.full)
    for batch in w.batches(5)[:2]:
        opt.step(batch)
    again = world(torch.float32, seed=1)
    resumed = SharpnessAware(BASES[base](again.parameters()), whole, rho, full=again.full)
    again.model.load_state_dict(w.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for a, b in zip(w.batches(5)[2:], again.batches(5)[2:], strict=True):
        assert torch.equal(opt.step(a), resumed.step(b))
    assert same_bits(w.parameters(), again.parameters())
    still = SharpnessAware(sgd(w, lr=0.0), whole, rho, full=w.full)
    before = w.weights()
    still.step(w.batch)
    assert same_bits(before, w.parameters())
