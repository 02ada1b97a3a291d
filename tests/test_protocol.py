"""What pieces declare is what they do. A piece that declares wrongly fails here, or raises in the step."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar

import pytest
import torch

import steppe
from steppe import Every, Micro, Oracle, Rule, SharpnessAware, Update, Vector
from steppe.engine.oracle import AnyRule
from steppe.engine.parameters import Parameters, Radii
from steppe.pieces.protocol import Declaration, declared
from tests.cases import CASES, Case, world
from tests.exact import ExactNorms

RHO = 0.1


def sgd(w) -> torch.optim.SGD:
    return torch.optim.SGD(w.parameters(), lr=0.1)


def rules_of(rule: AnyRule) -> list[Rule]:
    """The templates inside a rule made of rules."""
    if isinstance(rule, Rule):
        return [rule]
    inner = [getattr(rule, f.name) for f in fields(rule)] if is_dataclass(rule) else []
    return [found for part in inner if callable(part) for found in rules_of(part)]


class Spy(Oracle):
    """An oracle that writes down what it is asked for."""

    asked: list[str]

    @property
    def g(self) -> Vector:
        self.asked.append("g")
        return super().g

    @g.setter
    def g(self, g: Vector) -> None:
        Oracle.g.fset(self, g)

    def losses_at_w(self) -> torch.Tensor:
        self.asked.append("losses_at_w")
        return super().losses_at_w()

    def batch(self, use: str = "the batch") -> steppe.Batch:
        self.asked.append("examples")
        return super().batch(use)

    def recall(self, name: str, default: Vector) -> Vector:
        self.asked.append(f"memory {name}")
        return super().recall(name, default)

    def remember(self, name: str, v: Vector, rate: float = 1.0) -> None:
        self.asked.append(f"memory {name}")
        super().remember(name, v, rate)


def spy(w, rule: Rule, full: bool = True) -> Spy:
    parameters = w.parameters()
    names = [name for name, _ in w.model.named_parameters()]
    p = Parameters(parameters, Radii([RHO] * len(parameters)), names)
    f = Spy(w.batch, p, declares=Declaration(losses_at_w=True, remembers=declared(rule).remembers), full=w.full)
    f.asked = []
    return f


def wrong(rule: Rule) -> list[str]:
    """What a rule's pieces do that they do not declare, on one batch."""
    found = []
    f, says = spy(world(), rule), declared(rule)
    eps = rule.perturbation(f)
    with f.at(eps):
        f.asked = []
        on = rule.select(f)
        g_adv = f.grad(on=on)
        if declared(rule.select).whole_batch and on is not None:
            found.append("select declares whole_batch and chooses")
    if "losses_at_w" in f.asked and not says.losses_at_w:
        found.append("losses_at_w")
    f.asked = []
    rule.combine(f, g_adv)
    if "g" in f.asked and not says.g:
        found.append("g")
    found += not_linear(rule, f, g_adv) + not_radial(rule, f) + not_weighted(rule)
    return found


def not_linear(rule: Rule, f: Spy, g_adv: Vector) -> list[str]:
    if not declared(rule.combine).linear:
        return []
    g, other_g, other = f.g, f.g.map(torch.sin), g_adv.map(torch.cos)

    def combined(g: Vector, g_adv: Vector) -> torch.Tensor:
        f.g = g
        update = rule.combine(f, g_adv)
        parts = [update.grad, *([] if update.beside is None else [update.beside])]
        return torch.cat([t.flatten() for v in parts for t in v.materialised()])

    mean = combined(0.3 * g + 0.7 * other_g, 0.3 * g_adv + 0.7 * other)
    means = 0.3 * combined(g, g_adv) + 0.7 * combined(other_g, other)
    f.g = g
    return [] if torch.allclose(mean, means, rtol=1e-10, atol=1e-12) else ["combine is not linear"]


def not_radial(rule: Rule, f: Spy) -> list[str]:
    if not declared(rule.geometry).radial:
        return []
    for scale in (0.01, 1.0, 7.0):
        d = f.w.map(torch.cos) * scale
        ours, theirs = rule.geometry(f, d).materialised(), (rule.geometry.radial(d.norm()) * d).materialised()
        if not all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(ours, theirs, strict=True)):
            return ["geometry is not radial"]
    return []


def not_weighted(rule: Rule) -> list[str]:
    weights = declared(rule.sample).weights
    if weights is None:
        return []
    f, n = spy(world(), rule), len(world().batch)
    rows = [f.grad(on=torch.tensor([i])).materialised() for i in range(n)]
    norms = torch.stack([torch.cat([t.flatten() for t in row]).norm() for row in rows])
    p = torch.full((n,), 1 / n, dtype=norms.dtype) if weights == "uniform" else rule.sample.weights(norms)
    by_hand = [sum(p[i] * rows[i][k] for i in range(n)) for k in range(len(rows[0]))]
    f = spy(world(), rule)
    f._shortcuts = Exactly()
    d = rule.sample(f).materialised()
    same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(d, by_hand, strict=True))
    return [] if same else ["sample is not the weighted gradient"]


class Exactly:
    """Shortcuts that know the norms, by one backward an example."""

    def update(self, f: Oracle, rule: AnyRule, m: int | None) -> None:
        return None

    def example_norms(self, f: Oracle) -> torch.Tensor:
        return ExactNorms()(f)

    def weighted_gradient(self, f: Oracle, weights: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pieces_declare_what_they_do(case: Case) -> None:
    w = world()
    rule = case.make(sgd(w), w, RHO).rule
    for template in rules_of(rule):
        assert wrong(template) == []


@dataclass(frozen=True)
class AsksForG:
    declares: ClassVar[Declaration] = Declaration(g=False)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(0.5 * (g_adv + f.g))


@dataclass(frozen=True)
class NotLinear:
    declares: ClassVar[Declaration] = Declaration(linear=True)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        return Update(g_adv.norm() * g_adv + f.g)


@dataclass(frozen=True)
class NotRadial:
    declares: ClassVar[Declaration] = Declaration(radial=True)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        return d.map(torch.sign)

    def radial(self, norm: torch.Tensor) -> torch.Tensor:
        return 1 / norm


@dataclass(frozen=True)
class NotUniform:
    declares: ClassVar[Declaration] = Declaration(weights="uniform")

    def __call__(self, f: Oracle) -> Vector:
        return f.grad(on=torch.tensor([0, 1]))


@dataclass(frozen=True)
class LossesAtW:
    declares: ClassVar[Declaration] = Declaration(whole_batch=True)

    def __call__(self, f: Oracle) -> torch.Tensor:
        return torch.topk(f.losses() - f.losses_at_w(), 3).indices


@dataclass(frozen=True)
class Forgetful:
    def __call__(self, f: Oracle) -> Vector:
        f.remember("last", f.g)
        return f.g


WRONG = {
    "g": Rule(combine=AsksForG()),
    "combine is not linear": Rule(combine=NotLinear()),
    "geometry is not radial": Rule(geometry=NotRadial()),
    "sample is not the weighted gradient": Rule(sample=NotUniform()),
    "losses_at_w": Rule(select=LossesAtW()),
    "select declares whole_batch and chooses": Rule(select=LossesAtW()),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_declaration_is_found(what: str) -> None:
    assert what in wrong(WRONG[what])


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (Rule(combine=AsksForG()), RuntimeError, "declares g=False"),
        (Rule(sample=steppe.OnFull(), select=LossesAtW()), RuntimeError, "losses_at_w=True"),
        (Rule(sample=Forgetful()), ValueError, "'last'"),
        (lambda f: Update(f.recall("last", default=f.g)), ValueError, "'last'"),
    ],
    ids=["g", "losses at w", "remember", "recall in a function"],
)
def test_a_step_with_a_wrong_declaration_raises_and_changes_nothing(rule, error, message) -> None:
    w = world()
    opt = SharpnessAware(sgd(w), rule, RHO, full=w.full)
    before = w.weights()
    with pytest.raises(error, match=message):
        opt.step(w.batch)
    assert all(torch.equal(a, b) for a, b in zip(before, w.parameters(), strict=True))
    assert not opt.state


def test_a_function_may_declare_too() -> None:
    def averaged(f: Oracle) -> Update:
        g = f.recall("mean", default=f.g).lerp(f.g, 0.1)
        f.remember("mean", g)
        return Update(g)

    averaged.declares = Declaration(g_adv=False, remembers=frozenset({"mean"}))
    w = world()
    opt = SharpnessAware(sgd(w), averaged, RHO)
    opt.step(w.batch)
    assert all("sharpness.mean" in state for state in opt.state.values())


def test_a_rule_declares_what_its_pieces_do() -> None:
    rule = Every(3, Micro(4, Rule(sample=steppe.Friendly(), select=steppe.Sharpest(0.5))), steppe.ReuseOrthogonal())
    says = declared(rule)
    assert says.examples
    assert says.losses_at_w
    assert says.remembers == {"friendly", "orthogonal"}
    assert not declared(Rule(combine=steppe.Perturbed())).g
    assert declared(Rule(combine=steppe.Weighted())).g
    assert not declared(Rule(select=steppe.Sharpest(1.0))).examples
