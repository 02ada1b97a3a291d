"""Regularisers on any model against autograd by hand, and against the drift."""

import pytest
import torch
from torch import nn

import steppe
from steppe import Micro, OnFull, Rule, Unnormalised
from steppe.factored import gradient_statistics
from steppe.sde import Equation, Scheme, SDEError, logistic, problem_of, quadratic, regularisers
from tests.test_theory import finite_sum, n

CRITERION = nn.CrossEntropyLoss(reduction="none")


def net_and_batch(*extra: nn.Module) -> tuple[nn.Module, steppe.Batch]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 4), *extra, nn.Tanh(), nn.Linear(4, 3)).double()
    return model, steppe.Batch.supervised(
        model, CRITERION, torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    )


def gradient_of(batch: steppe.Batch, model: nn.Module, create_graph: bool = False) -> torch.Tensor:
    grads = torch.autograd.grad(batch.losses().mean(), list(model.parameters()), create_graph=create_graph)
    return torch.cat([g.flatten() for g in grads])


def test_a_models_terms_are_those_of_autograd_by_hand():
    model, batch = net_and_batch()
    rho, m = 0.3, 1
    terms = regularisers(*problem_of(batch), rho, m)
    g = gradient_of(batch, model, create_graph=True)
    g_i = torch.stack([gradient_of(part, model, create_graph=True) for part in batch.split(1)])
    by_hand = {
        "loss": batch.losses().mean(),
        "gradient": rho / 2 * g.square().sum(),
        "variance": rho / (2 * m) * (g_i - g).square().sum(1).mean(),  # (n - 1) / (n - 1) = 1
        "full_norm": rho * g.norm(),
        "norm": rho * g_i.norm(dim=1).mean(),
    }
    for name, value in by_hand.items():
        term = getattr(terms, name)
        grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(term.value, value.detach())
        torch.testing.assert_close(term.gradient, torch.cat([t.flatten() for t in grads]))
    assert float(terms.variance.value) * 2 / rho == pytest.approx(float(gradient_statistics(batch).trace))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_the_variance_term_has_the_finite_population_factor(m, replacement):
    A, b, x = finite_sum()
    terms = regularisers(quadratic(A, b), x, 0.2, m, replacement)
    g_i = A @ x + b
    c = 1 if replacement else (n - m) / (n - 1)
    trace = (g_i - g_i.mean(0)).square().sum(1).mean()
    assert float(terms.variance.value) == pytest.approx(0.2 * c / (2 * m) * float(trace))


def test_their_gradients_are_the_drifts():
    torch.manual_seed(2)
    problem = logistic(torch.randn(5, 2, dtype=torch.float64), torch.tensor([1.0, -1, 1, 1, -1]).double())
    x, rho = torch.tensor([0.7, -1.2], dtype=torch.float64), 0.3
    one, whole = regularisers(problem, x, rho, 1), regularisers(problem, x, rho, 5)
    drifts = {
        Micro(1, Rule(geometry=Unnormalised())): one.loss + one.gradient + one.variance,
        Rule(geometry=Unnormalised()): whole.loss + whole.gradient + whole.variance,
        Rule(OnFull(), Unnormalised()): one.loss + one.gradient,
        Micro(1, Rule()): one.loss + one.norm,
        Rule(): whole.loss + whole.norm,
        Rule(OnFull()): one.loss + one.full_norm,
    }
    for rule, term in drifts.items():
        torch.testing.assert_close(Equation(problem, Scheme(rule, 0.1, rho, 5)).drift(x), -term.gradient)


def test_micro_batches_count_every_example_equally():
    A, b, x = finite_sum(1)
    g = A @ x + b
    exact = torch.stack([(g[i] + g[j]).norm() / 2 for i in range(n) for j in range(i)]).mean()
    terms = regularisers(quadratic(A, b), x, 1.0, 2, repeats=2000, generator=torch.Generator().manual_seed(0))
    assert float(terms.norm.value) == pytest.approx(float(exact), rel=0.02)
    with_replacement = torch.stack([(g[i] + g[j]).norm() / 2 for i in range(n) for j in range(n)]).mean()
    terms = regularisers(quadratic(A, b), x, 1.0, 2, True, repeats=2000, generator=torch.Generator().manual_seed(0))
    assert float(terms.norm.value) == pytest.approx(float(with_replacement), rel=0.02)


def test_smaller_micro_batches_have_a_larger_mean_norm():
    A, b, x = finite_sum(4)
    values = [float(regularisers(quadratic(A, b), x, 1.0, m).norm.value) for m in (1, 2, 3, 6)]
    assert values == sorted(values, reverse=True)


def test_frozen_parameters_are_constants():
    model, batch = net_and_batch()
    model[0].weight.requires_grad_(False)
    problem, x = problem_of(batch)
    assert len(x) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(problem.losses(x), batch.losses().detach())


def test_a_model_whose_examples_mix_is_refused_and_left_as_it_was():
    model, batch = net_and_batch(nn.BatchNorm1d(4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(SDEError, match=r"call model.eval\(\)"):
        problem_of(batch)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name
    model.eval()
    problem, x = problem_of(batch)
    torch.testing.assert_close(problem.losses(x), batch.losses().detach())


def test_a_model_that_draws_random_numbers_is_refused():
    _, batch = net_and_batch(nn.Dropout(0.5))
    with pytest.raises(SDEError, match="deterministic"):
        problem_of(batch)


def test_a_loss_that_is_not_per_example_is_named():
    model, batch = net_and_batch()
    averaged = steppe.Batch(model, lambda model, data: nn.functional.cross_entropy(model(data[0]), data[1]), batch.data)
    with pytest.raises(SDEError, match="one loss per example"):
        problem_of(averaged)


def test_a_loss_that_is_not_finite_is_named():
    _, batch = net_and_batch()
    batch.data[0][2, 0] = float("nan")
    with pytest.raises(SDEError, match="the loss of example 2 is not finite"):
        problem_of(batch)


def test_bad_numbers_are_named():
    A, b, x = finite_sum()
    with pytest.raises(SDEError, match="m must be at most the number of examples, got 7 of 6"):
        regularisers(quadratic(A, b), x, 0.1, 7)
    with pytest.raises(ValueError, match="rho must be"):
        regularisers(quadratic(A, b), x, -0.1, 1)
    frozen = nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(SDEError, match="no parameter that requires a gradient"):
        problem_of(steppe.Batch(frozen, lambda model, data: model(data).squeeze(1), torch.ones(3, 2)))
