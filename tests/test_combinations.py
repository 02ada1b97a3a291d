"""Random combinations of pieces against an independent composition on a flat vector."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import steppe
from steppe import (
    Adaptive,
    All,
    Coupled,
    Euclidean,
    Every,
    Everything,
    Fisher,
    Friendly,
    Mean,
    Micro,
    OnFull,
    Perturbed,
    Reweighted,
    Rule,
    Sharpest,
    SharpnessAware,
    Smoothed,
    SurrogateGap,
    Unified,
    Unnormalised,
    Weighted,
)
from tests.cases import BASES, N, same_bits, world
from tests.exact import ExactNorms
from tests.reference import Base, Problem, flat

share = st.floats(0.05, 1.0)
plain_samples = st.one_of(
    st.just(Mean()), st.builds(Reweighted, st.floats(0, 5), st.just(ExactNorms())), st.just(OnFull())
)
samples = st.one_of(
    plain_samples,
    st.builds(Friendly, st.floats(0, 0.9), st.floats(0, 1), plain_samples),
    st.builds(Smoothed, share, plain_samples),
)
geometries = st.one_of(
    st.just(Euclidean()),
    st.just(Unnormalised()),
    st.builds(Unified, st.floats(0, 1)),
    st.builds(Adaptive, st.floats(0, 0.5), st.just(Everything())),
    st.builds(Adaptive, st.floats(0, 0.5)),
    st.builds(Fisher, st.floats(0, 3)),
)
selects = st.one_of(st.just(All()), st.builds(Sharpest, share))
combines = st.one_of(
    st.just(Perturbed()),
    st.builds(Weighted, st.floats(0, 0.95)),
    st.builds(Coupled, st.floats(0, 0.95)),
    st.builds(SurrogateGap, st.floats(0, 1)),
)
rules = st.builds(Rule, samples, geometries, selects, combines)


class Composition:
    """The same four slots on flat vectors, from the formulas; memory by name."""

    def __init__(self, rule: Rule, rho: float, weights: torch.Tensor) -> None:
        self.rule, self.rho, self.is_weight, self.memory = rule, rho, weights, {}

    def step(self, p: Problem, w: torch.Tensor, remembered: dict) -> tuple[torch.Tensor, torch.Tensor]:
        r, g = self.rule, p.grad(w)
        eps = self.rho * self.geometry(r.geometry, self.sample(r.sample, p, w, remembered), w)
        g_adv = self.g_adv(r.select, p, w, eps)
        zero = torch.zeros_like(w)
        match r.combine:
            case Perturbed():
                return g_adv, zero
            case Weighted(gamma):
                return g, gamma / (1 - gamma) * (g_adv - g)
            case Coupled(gamma):
                return (1 - gamma / (1 - gamma)) * g + gamma / (1 - gamma) * g_adv, zero
            case SurrogateGap(alpha):
                unit = g_adv / g_adv.norm()
                return g_adv - alpha * (g - (g @ unit) * unit), zero

    def sample(self, piece, p, w, remembered):
        match piece:
            case Mean():
                return p.grad(w)
            case OnFull():
                return p.full.grad(w)
            case Reweighted(lam, _):
                rows = p.grads(w)
                return torch.softmax(lam * rows.norm(dim=1), 0) @ rows
            case Friendly(sigma, decay, of):
                g = self.sample(of, p, w, remembered)
                m = self.memory.get("m")
                remembered["m"] = g if m is None else decay * m + (1 - decay) * g
                return g if m is None else g - sigma * m
            case Smoothed(theta, of):
                g = self.sample(of, p, w, remembered)
                d = self.memory.get("d")
                remembered["d"] = g if d is None else (1 - theta) * d + theta * g
                return remembered["d"]

    def geometry(self, piece, d, w):
        match piece:
            case Euclidean():
                return d / d.norm()
            case Unnormalised():
                return d
            case Unified(lam):
                return (1 - lam) * d + lam * d / d.norm()
            case Adaptive(eta, Everything()):
                T = w.abs() + eta
            case Adaptive(eta, _):
                T = torch.where(self.is_weight, w.abs() + eta, 1.0)
            case Fisher(eta):
                T = (1 / (1 + eta * d**2)).sqrt()
        return T**2 * d / (T * d).norm()

    def g_adv(self, select, p, w, eps):
        rows = p.grads(w + eps)
        if isinstance(select, Sharpest) and select.gamma < 1:
            rise = p.losses(w + eps) - p.losses(w)
            k = max(1, int(select.gamma * p.n))
            rows = rows[rise.argsort(descending=True)[:k]]
        return rows.mean(0)

    def update(self, p: Problem, w: torch.Tensor, m: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        u, beside, kept = 0, 0, {}
        for start in range(0, p.n, m or p.n):
            part = p.part(start, min(start + (m or p.n), p.n))
            remembered: dict[str, torch.Tensor] = {}
            a, b = self.step(part, w, remembered)
            u, beside = u + part.n / p.n * a, beside + part.n / p.n * b
            for name, value in remembered.items():
                kept[name] = kept.get(name, 0) + part.n / p.n * value
        self.memory = kept
        return u, beside


relaxed = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@relaxed
@given(rule=rules, m=st.sampled_from([None, 1, 3, 4, N]), rho=st.floats(0.01, 0.5))
def test_any_combination_is_what_its_formulas_say(rule: Rule, m: int | None, rho: float) -> None:
    w = world()
    loss = nn.CrossEntropyLoss(reduction="none")
    problems = [Problem.from_module(w.model, loss, b.data, (w.full_x, w.full_y)) for b in w.batches(3)]
    point = flat(w.model)
    is_weight = torch.cat([torch.full((p.numel(),), p.dim() > 1) for p in w.parameters()])
    composition, base = Composition(rule, rho, is_weight), Base("momentum", 0.05, weight_decay=0.02)
    torch_base = torch.optim.SGD(w.parameters(), lr=0.05, momentum=0.9, weight_decay=0.02)
    opt = SharpnessAware(torch_base, rule if m is None else Micro(m, rule), rho, full=w.full)
    for batch, problem in zip(w.batches(3), problems, strict=True):
        opt.step(batch)
        u, beside = composition.update(problem, point, m)
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
    rule: Rule, m: int | None, k: int, base: str, rho: float
) -> None:
    whole = Every(k, rule if m is None else Micro(m, rule))
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
    still = SharpnessAware(torch.optim.SGD(w.parameters(), lr=0.0), whole, rho, full=w.full)
    before = w.weights()
    still.step(w.batch)
    assert same_bits(before, w.parameters())
