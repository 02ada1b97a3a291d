"""Paths against closed forms, and the order of the weak error."""

import math

import pytest
import torch

from steppe import Micro, Plain, Rule, Unnormalised
from steppe.sde import (
    Equation,
    FiniteSum,
    GroupMean,
    Scheme,
    SDEError,
    estimate,
    fit,
    logistic,
    paths,
    quadratic,
    simulate,
    weak_error,
)
from steppe.sde.study import ErrorStudy
from tests.test_theory import finite_sum

from .test_equation import real_updates


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_ornstein_uhlenbecks_moments():
    """One Hessian a for all: SGD's equation is dX = -a X dt + sqrt(lr) s dW, whose moments are known."""
    a, lr, b = 2.0, 0.1, torch.tensor([[-1.0], [1.0], [3.0], [-3.0]], dtype=torch.float64)
    problem = quadratic(torch.full((4, 1, 1), a, dtype=torch.float64), b)
    equation = Equation(problem, Scheme(Plain(), lr, 0.0, 2))
    variance = float(b.var(correction=0)) / 2 * (4 - 2) / (4 - 1)  # of a batch of 2 out of 4
    x0, time, paths, h = 1.5, 0.8, 20_000, 0.8 / 100
    *_, end = simulate(equation, torch.full((paths, 1), x0, dtype=torch.float64), time, 100, generator())
    mean, spread = x0 * math.exp(-a * time), lr * variance / (2 * a) * (1 - math.exp(-2 * a * time))
    bias = 2 * a * h  # of Euler-Maruyama, relative, at most
    assert float(end.mean()) == pytest.approx(mean, abs=4 * math.sqrt(spread / paths) + bias * mean)
    assert float(end.var()) == pytest.approx(spread, rel=4 * math.sqrt(2 / paths) + bias)


def test_m_usam_is_an_ornstein_uhlenbeck_process_too():
    """With one Hessian u = (1 + rho a) g on every micro-batch: rate and noise are scaled by it."""
    a, rho, lr = 2.0, 0.25, 0.1
    b = torch.tensor([[-1.0], [1.0], [3.0], [-3.0]], dtype=torch.float64)
    problem = quadratic(torch.full((4, 1, 1), a, dtype=torch.float64), b)
    equation = Equation(problem, Scheme(Micro(1, Rule(geometry=Unnormalised())), lr, rho, 2))
    x = torch.tensor([0.7], dtype=torch.float64)
    assert float(equation.drift(x)) == pytest.approx(-(1 + rho * a) * a * 0.7)
    sigma = equation.diffusion(x)
    batch_variance = float(b.var(correction=0)) / 2 * (4 - 2) / (4 - 1)
    assert float((sigma @ sigma.T).squeeze()) == pytest.approx(lr * (1 + rho * a) ** 2 * batch_variance)


def test_the_mean_of_a_linear_scheme_has_order_one_and_corrected_order_two():
    """On quadratics USAM's mean is a linear recursion, and the equation's mean an ordinary differential equation."""
    A, b, x0 = finite_sum(3)
    problem = quadratic(A / 4, b)
    errors = {False: [], True: []}
    lrs = (0.1, 0.05)
    for lr in lrs:
        scheme, x = Scheme(Rule(geometry=Unnormalised()), lr, 0.1, 2), x0
        for _ in range(round(0.5 / lr)):
            x = x - lr * real_updates(problem, scheme, x).mean(0)
        for corrected, found in errors.items():
            found.append((flow(Equation(problem, scheme, corrected), x0, 0.5) - x).norm())
    assert math.log2(errors[False][0] / errors[False][1]) == pytest.approx(1, abs=0.1)
    assert math.log2(errors[True][0] / errors[True][1]) == pytest.approx(2, abs=0.15)
    assert errors[True][1] < 0.2 * errors[False][1]


def flow(equation: Equation, x: torch.Tensor, time: float) -> torch.Tensor:
    """The classical Runge-Kutta method on dx/dt = b(x)."""
    steps = 20
    h = time / steps
    for _ in range(steps):
        k1 = equation.drift(x)
        k2 = equation.drift(x + h / 2 * k1)
        k3 = equation.drift(x + h / 2 * k2)
        k4 = equation.drift(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def weak_errors(rule, lrs, rho, corrected, paths=640):
    problem, start = ErrorStudy().problem_and_start()
    runs = [Equation(problem, Scheme(rule, lr, rho, 2), corrected) for lr in lrs]
    return [estimate(weak_error(run, start, 1.0, paths)["f"]) for run in runs]


@pytest.mark.parametrize("rule", [Plain(), Micro(1, Rule())], ids=["SGD", "m-SAM"])
def test_the_weak_error_has_order_one_in_lr(rule):
    lrs = (0.2, 0.1, 0.05)
    slope = fit(lrs, weak_errors(rule, lrs, 0.005, corrected=False))
    assert slope.points == 3
    assert slope.slope == pytest.approx(1, abs=0.1)
    assert slope.high - slope.low < 0.4


def test_the_corrected_weak_error_has_order_two_in_lr():
    lrs = (0.2, 0.1)
    plain, corrected = (weak_errors(Plain(), lrs, 0.0, c, paths=4000) for c in (False, True))
    slope = fit(lrs, corrected)
    assert slope.low < 2 < slope.high
    assert slope.low > 1.2
    assert all(abs(c.mean) < 0.3 * abs(p.mean) for c, p in zip(corrected, plain, strict=True))


@pytest.mark.parametrize("rule", [Rule(geometry=Unnormalised()), Micro(1, Rule())], ids=["USAM", "m-SAM"])
def test_the_weak_error_has_order_two_in_rho(rule):
    """Beyond the error at rho 0, with the same batches and Brownian motion."""
    problem, start = ErrorStudy().problem_and_start("rho")
    groups = {
        rho: weak_error(Equation(problem, Scheme(rule, 0.05, rho, 2), True), start, 0.4, 320)["f"]
        for rho in (0.0, 0.05, 0.1)
    }
    beyond = [estimate([a - b for a, b in zip(groups[rho], groups[0.0], strict=True)]) for rho in (0.05, 0.1)]
    slope = fit((0.05, 0.1), beyond)
    assert slope.points == 2
    assert slope.slope == pytest.approx(2, abs=0.2)


def test_batches_that_follow_the_brownian_motion_are_as_good_as_independent_ones(monkeypatch):
    problem, start = ErrorStudy().problem_and_start()
    equation = Equation(problem, Scheme(Micro(1, Rule()), 0.2, 0.1, 2))
    coupled = estimate(weak_error(equation, start, 0.4, 4000)["f"])
    draws, largest = torch.Generator().manual_seed(1), paths.largest
    monkeypatch.setattr(paths, "largest", lambda z, scheme: largest(torch.rand(len(z), 6, generator=draws), scheme))
    independent = estimate(weak_error(equation, start, 0.4, 4000)["f"])
    assert abs(coupled.mean - independent.mean) < 4 * math.hypot(coupled.error, independent.error)
    assert coupled.error < 0.8 * independent.error


def test_a_batch_with_replacement_is_compared_too():
    problem, start = ErrorStudy().problem_and_start()
    scheme = Scheme(Micro(1, Rule(geometry=Unnormalised())), 0.25, 0.05, 2, replacement=True)
    plain, corrected = (weak_error(Equation(problem, scheme, c), start, 1.0, 2000)["f"] for c in (False, True))
    assert abs(estimate(corrected).mean) < 0.5 * abs(estimate(plain).mean)


def test_a_slope_and_its_interval():
    errors = [GroupMean(3.0 * h**2, 0.03 * h**2) for h in (0.1, 0.2, 0.4)]
    slope = fit((0.1, 0.2, 0.4), errors)
    half = 1.96 * 0.01 / (math.sqrt(2) * math.log(2))  # weights 1/0.01^2, spread 2 log(2)^2
    assert (slope.slope, slope.low, slope.high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert fit((0.1, 0.2, 0.4), [GroupMean(1.0, 0.1), GroupMean(0.1, 0.1), GroupMean(0.1, 0.2)]) is None


def test_full_batches_have_no_noise_and_sharp_orders():
    problem, start = ErrorStudy().problem_and_start()
    errors = [
        estimate(weak_error(Equation(problem, Scheme(Plain(), lr, 0.0, 6), True), start, 0.4, 32)["f"])
        for lr in (0.05, 0.025)
    ]
    assert max(e.error for e in errors) < 1e-12
    assert fit((0.05, 0.025), errors).slope == pytest.approx(2, abs=0.1)


def test_progress_is_reported_and_may_interrupt():
    problem, start = ErrorStudy().problem_and_start()
    seen = []

    def stop(step, steps):
        seen.append((step, steps))
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weak_error(Equation(problem, Scheme(Plain(), 0.1, 0.0, 2)), start, 1.0, 32, progress=stop)
    assert seen == [(1, 10), (2, 10)]


def test_what_is_not_finite_is_named():
    problem = FiniteSum(lambda x, row: (row @ x) ** 4, torch.ones(3, 1, dtype=torch.float64))
    equation, far = Equation(problem, Scheme(Plain(), 1.0, 0.0, 1)), torch.full((5, 1), 50.0, dtype=torch.float64)
    with pytest.raises(SDEError, match=r"the equation's paths after step \d+ of 1 are not finite in 5 of 5"):
        list(simulate(equation, far, 20.0, 20, generator()))
    with pytest.raises(SDEError, match=r"the (optimizer|equation)'s paths( at time \d)? are not finite in 32 of 32"):
        weak_error(equation, far[0], 20.0, 32)


def test_bad_numbers_are_named():
    X, y = torch.randn(4, 2, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    equation = Equation(logistic(X, y), Scheme(Plain(), 0.3, 0.0, 1))
    with pytest.raises(SDEError, match=r"time must be a positive multiple of lr, got 1 and 0\.3"):
        weak_error(equation, torch.zeros(2, dtype=torch.float64), 1.0)
    with pytest.raises(SDEError, match="paths must be at least 32, got 10"):
        weak_error(equation, torch.zeros(2, dtype=torch.float64), 0.6, 10)
    with pytest.raises(ValueError, match="rho must be a finite number >= 0"):
        Scheme(Plain(), 0.1, -1.0, 1)
