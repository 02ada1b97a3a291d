import math

import pytest
import torch

from steppe.measure import AverageCase, Problem, WorstCase, published
from steppe.measure.ball import checkpoints

from .models import CRITERION, Quadratic, data, losses, net, problem, quadratic

H, RHO = [5.0, 2.0, 0.5], 0.3


@pytest.mark.parametrize(
    ("norm", "adaptive", "expected"),
    [("l2", False, 0.225), ("linf", False, 0.3375), ("l2", True, 0.36), ("linf", True, 0.7875)],
)
def test_worst_cases_on_a_quadratic(norm, adaptive, expected):
    at = [1.0, 2.0, 3.0] if adaptive else [0.0, 0.0, 0.0]
    found = WorstCase(RHO, norm, adaptive, starts=2)(quadratic(H, at))
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.value <= expected + 1e-12


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_average_cases_on_a_quadratic(norm, adaptive):
    at = [1.0, 2.0, 3.0] if adaptive else [0.0, 0.0, 0.0]
    expected = (0.7875 if adaptive else 0.3375) * (1 if norm == "l2" else 1 / 3)
    found = AverageCase(RHO, norm, adaptive, draws=3000)(quadratic(H, at))
    assert abs(found.value - expected) < 3.5 * found.error
    assert found.error < 0.03 * expected


def test_one_step_is_sams_own_perturbation():
    model = net()
    (inputs, targets), n = data(), 23
    g = torch.autograd.grad(losses(model, (inputs, targets)).mean(), list(model.parameters()))
    norm = torch.stack([t.norm() for t in g]).norm()
    before = losses(model, (inputs, targets)).mean()
    found = WorstCase(0.1, steps=1, m=None)(Problem(model, CRITERION, (inputs, targets)))
    with torch.no_grad():
        for p, t in zip(model.parameters(), g, strict=True):
            p.add_(0.1 * t / norm)
    assert found.value == pytest.approx(float((losses(model, (inputs, targets)).mean() - before).detach()), rel=1e-9)
    assert (found.passes, len(found.rises), n) == (3, 1, len(targets))


def test_m_sharpness_is_the_mean_over_subsets():
    whole, measure = problem(), WorstCase(0.2, m=5, steps=8)
    found = measure(whole)
    parts = [WorstCase(0.2, m=None, steps=8)(part) for part in whole.split(5)]
    sizes = [part.n for part in whole.split(5)]
    assert found.value == pytest.approx(sum(n * p.value for n, p in zip(sizes, parts, strict=True)) / 23, rel=1e-12)
    assert found.rises == tuple(p.value for p in parts)
    assert math.isfinite(found.error)
    assert found.value > WorstCase(0.2, m=None, steps=8)(whole).value  # smaller m, sharper


def test_the_ascent_beats_random_search_and_stays_in_the_ball():
    whole = problem()
    best = max(AverageCase(0.3 / math.sqrt(59), m=None, draws=300)(whole).rises)  # of length 0.3, about
    worst = WorstCase(0.3, m=None)(whole)
    assert worst.value > best > 0
    assert WorstCase(0.3, m=None, steps=40)(whole).value >= 0.999 * worst.value
    assert WorstCase(0.0, m=None)(whole).value == 0


def test_everything_is_as_it_was():
    model = net()
    losses(model, data()).sum().backward()
    tensors = [p.detach().clone() for p in model.parameters()]
    grads, state = [p.grad for p in model.parameters()], torch.get_rng_state()
    for measure in (WorstCase(0.1, m=7), AverageCase(0.1, m=7)):
        first, again = measure(problem(model)), measure(problem(model))
        assert first == again
    assert all(torch.equal(p, t) for p, t in zip(model.parameters(), tensors, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_checkpoints_are_the_papers():
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_the_published_protocol_takes_1024_examples_in_evaluation_mode():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)).double()
    xy = data(1100)
    found = published(Problem(model, CRITERION, xy, mode="train"), AverageCase(0.1, draws=2))
    assert len(found.rises) == 8 * 2
    by_hand = Problem(model, CRITERION, tuple(t[:1024] for t in xy), mode="eval")
    assert found == AverageCase(0.1, m=128, draws=2)(by_hand)
    worst, average = WorstCase(0.5), AverageCase(0.1)
    assert (worst.m, worst.steps, worst.norm, average.m, average.draws) == (128, 20, "l2", 128, 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorstCase(-1.0), "rho must be"),
        (lambda: WorstCase(0.1, norm="l1"), "norm must be"),
        (lambda: WorstCase(0.1, m=0), "m must be"),
        (lambda: WorstCase(0.1, steps=0), "steps must be"),
        (lambda: AverageCase(0.1, draws=0), "draws must be"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_is_not_finite_in_the_ball_is_named():
    class Edge(Quadratic):
        def forward(self, x):
            return x * (1 - self.w.sum()).log()

    steep = Problem(Edge([1.0], [0.5]), lambda model, x: model(-x), torch.ones(3, dtype=torch.float64))
    with pytest.raises(FloatingPointError, match="choose a smaller rho"):
        WorstCase(0.6)(steep)
    with torch.no_grad():
        assert float(steep.model.w) == 0.5


def test_measures_are_values():
    measure = WorstCase(0.1, "linf", m=None)
    assert eval(repr(measure)) == measure
