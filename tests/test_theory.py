"""Every batch of a small finite sum, enumerated: the drift identities of the m-sharpness theory."""

from dataclasses import dataclass
from itertools import combinations, permutations, product

import pytest
import torch

import steppe
from tests.cases import sgd
from tests.exact import Quadratic

n, d = 6, 3


def finite_sum(seed: int = 0, one_hessian: bool = False):
    torch.manual_seed(seed)
    M = torch.randn(1 if one_hessian else n, d, d, dtype=torch.float64).expand(n, d, d)
    return M @ M.mT, torch.randn(n, d, dtype=torch.float64), torch.randn(d, dtype=torch.float64)


def mean_update(A, b, w, size: int, make, replacement: bool = False) -> torch.Tensor:
    """The expected gradient that the base sees, over all batches of ``size``."""
    return mean_over(product(range(n), repeat=size) if replacement else combinations(range(n), size), A, b, w, make)


def mean_over(ways, A, b, w, make) -> torch.Tensor:
    """The mean of the gradient that the base sees, over batches given by the indices of their examples."""
    total, count = torch.zeros(d, dtype=torch.float64), 0
    for index in ways:
        model = Quadratic(w.tolist())
        opt = make(sgd(model, lr=1.0))
        opt.step(model.batch(A[list(index)], b[list(index)]))
        total, count = total + (w - model.weight.detach()), count + 1
    return total / count


def regularised_gradient(A, b, w, rho: float, factor: float) -> torch.Tensor:
    """The gradient of ``f + rho / 2 norm(grad f)^2 + rho / 2 factor tr V`` by autograd."""
    w = w.clone().requires_grad_()
    g_i = torch.einsum("nij,j->ni", A, w) + b
    g = g_i.mean(0)
    tr_V = (g_i - g).square().sum(1).mean()
    f = (0.5 * torch.einsum("i,nij,j->n", w, A, w) + b @ w).mean()
    (gradient,) = torch.autograd.grad(f + rho / 2 * g.square().sum() + rho / 2 * factor * tr_V, w)
    return gradient


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_mini_batch_usam_descends_the_variance(size: int) -> None:
    """f + rho/2 norm(grad f)^2 + rho / (2 size) tr V, times (n - size) / (n - 1) without replacement."""
    A, b, w = finite_sum()
    usam = lambda base: steppe.USAM(base, rho=0.3)  # noqa: E731
    factor = (n - size) / (n - 1) / size
    torch.testing.assert_close(
        mean_update(A, b, w, size, usam), regularised_gradient(A, b, w, 0.3, factor), rtol=0, atol=1e-9
    )
    if size <= 3:
        with_replacement = mean_update(A, b, w, size, usam, replacement=True)
        torch.testing.assert_close(with_replacement, regularised_gradient(A, b, w, 0.3, 1 / size), rtol=0, atol=1e-9)
        if size > 1:
            assert (with_replacement - regularised_gradient(A, b, w, 0.3, factor)).norm() > 1e-3


@pytest.mark.parametrize(("size", "m"), [(4, 2), (6, 3), (3, 1), (4, 1)])
def test_m_usam_descends_the_variance_of_m_examples(size: int, m: int) -> None:
    A, b, w = finite_sum(1)
    total, count = torch.zeros(d, dtype=torch.float64), 0
    for batch in combinations(range(n), size):
        for part in combinations(batch, m):  # micro-batches are consecutive: take every split into parts of m
            order = [*part, *(i for i in batch if i not in part)]
            model = Quadratic(w.tolist())
            opt = steppe.USAM(sgd(model, lr=1.0), rho=0.3, m=m)
            opt.step(model.batch(A[order], b[order]))
            total, count = total + (w - model.weight.detach()), count + 1
    expected = regularised_gradient(A, b, w, 0.3, (n - m) / (n - 1) / m)
    torch.testing.assert_close(total / count, expected, rtol=0, atol=1e-9)


def test_n_usam_has_no_variance_term() -> None:
    A, b, w = finite_sum(2)

    def make(base):
        full = Quadratic(w.tolist())
        model_parameter = base.param_groups[0]["params"][0]
        full.weight = model_parameter
        rule = steppe.Rule(steppe.OnFull(), steppe.Unnormalised())
        return steppe.SharpnessAware(base, rule, 0.3, full=full.batch(A, b))

    expected = regularised_gradient(A, b, w, 0.3, 0.0)
    torch.testing.assert_close(mean_update(A, b, w, 2, make), expected, rtol=0, atol=1e-9)


def test_with_one_hessian_m_usam_is_usam_for_every_m() -> None:
    """tr V is constant then: the variance regulariser has no gradient."""
    A, b, w = finite_sum(3, one_hessian=True)
    ends = []
    for m in (1, 2, 3, 6, None):
        model = Quadratic(w.tolist())
        steppe.USAM(sgd(model), 0.3, m=m).step(model.batch(A, b))
        ends.append(model.weight.detach())
    for end in ends:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-12)


def test_smaller_batches_have_larger_gradients_on_average() -> None:
    A, b, w = finite_sum(4)
    g = torch.einsum("nij,j->ni", A, w) + b
    norms = []
    for size in range(1, n + 1):
        rows = [g[list(i)].mean(0).norm() for i in combinations(range(n), size)]
        norms.append(float(torch.stack(rows).mean()))
    assert norms == sorted(norms, reverse=True)
    # the optimizer's own telemetry says the same
    model = Quadratic(w.tolist())
    opt = steppe.SAM(sgd(model, lr=0.0), 0.1, m=1)
    opt.step(model.batch(A, b))
    assert float(opt.telemetry.g_norm) == pytest.approx(norms[0])


@dataclass(frozen=True)
class Independent:
    """Weights that do not depend on the examples: the first of the batch has the first, and so on."""

    p: tuple[float, ...]

    def __call__(self, f: steppe.Oracle) -> torch.Tensor:
        return torch.tensor(self.p, dtype=torch.float64)


@dataclass(frozen=True)
class Ascent:
    """``sum_i p_i grad f_i`` for the perturbation alone: the second gradient is uniform."""

    weights: Independent

    def __call__(self, f: steppe.Oracle) -> steppe.Vector:
        return f.grad(weights=self.weights(f))


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("p", [(0.6, 0.3, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.0, 1.0, 0.0)], ids=str)
def test_weights_on_the_perturbation_alone_leave_sams_share_of_the_variance(p, replacement: bool) -> None:
    """The coefficient of ``grad(tr V / 2)`` is ``c / b`` whatever the weights are; on both sides ``sum p_i^2``."""
    (A, b, w), rho, size = finite_sum(), 0.1, len(p)
    c = 1.0 if replacement else (n - size) / (n - 1)
    squares = sum(x * x for x in p)
    both = squares if replacement else (n * squares - 1) / (n - 1)  # of a finite population
    alone = steppe.Rule(sample=Ascent(Independent(p)), geometry=steppe.Unnormalised())
    on_both = steppe.BothWeighted(Independent(p), steppe.Unnormalised())
    for rule, coefficient in ((alone, c / size), (on_both, both)):
        ways = product(range(n), repeat=size) if replacement else permutations(range(n), size)
        make = lambda base, rule=rule: steppe.SharpnessAware(base, rule, rho)  # noqa: E731
        found = mean_over(ways, A, b, w, make)
        torch.testing.assert_close(found, regularised_gradient(A, b, w, rho, coefficient), rtol=0, atol=1e-9)
        if coefficient > c / size + 1e-9:  # the test can tell them apart
            assert (found - regularised_gradient(A, b, w, rho, c / size)).norm() > 1e-3
