"""Drift and diffusion against real updates of every batch, enumerated."""

from itertools import combinations, permutations, product

import pytest
import torch

import steppe
from steppe import Micro, OnFull, Plain, Rule, Unnormalised
from steppe.sde import Equation, FiniteSum, RealPaths, Scheme, SDEError, logistic, quadratic
from steppe.sde.equation import sampling
from tests.test_theory import d, finite_sum, n, regularised_gradient

RULES = {
    "SGD": Plain(),
    "USAM": Rule(geometry=Unnormalised()),
    "m-USAM": Micro(2, Rule(geometry=Unnormalised())),
    "m-USAM, m = 1": Micro(1, Rule(geometry=Unnormalised())),
    "n-USAM": Rule(OnFull(), Unnormalised()),
    "SAM": Rule(),
    "m-SAM": Micro(2, Rule()),
    "n-SAM": Rule(OnFull()),
}
SIZE = 4


def all_batches(n: int, size: int, replacement: bool, ordered: bool) -> torch.Tensor:
    """Every batch, equally likely; with every order, where micro-batches are formed from it."""
    if replacement:
        return torch.tensor(list(product(range(n), repeat=size)))
    sets = combinations(range(n), size)
    return torch.tensor([order for s in sets for order in (permutations(s) if ordered else [s])])


def real_updates(problem: FiniteSum, scheme: Scheme, x: torch.Tensor) -> torch.Tensor:
    """What the library's optimizer does with every batch, shape (batches, d)."""
    index = all_batches(len(problem), scheme.size, scheme.replacement, scheme.m < scheme.size)
    here = x.expand(len(index), -1)
    return (here - RealPaths(problem, scheme, here).step(index)) / scheme.lr


def logistic_problem() -> tuple[FiniteSum, torch.Tensor]:
    torch.manual_seed(5)
    X, y = torch.randn(5, 2, dtype=torch.float64), torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64)
    return logistic(X, y), torch.tensor([0.7, -1.2], dtype=torch.float64)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_on_quadratics_drift_and_diffusion_are_the_exact_moments_of_the_update(name, replacement):
    A, b, x = finite_sum(6)
    n = 4 if replacement else 6  # 4^4 batches, or 6 choose 4 in every order
    problem, scheme = quadratic(A[:n], b[:n]), Scheme(RULES[name], 0.1, 0.3, SIZE, replacement)
    u = real_updates(problem, scheme, x)
    equation = Equation(problem, scheme)
    torch.testing.assert_close(equation.drift(x), -u.mean(0), rtol=0, atol=1e-9)
    covariance = (u - u.mean(0)).T @ (u - u.mean(0)) / len(u)
    sigma = equation.diffusion(x)
    torch.testing.assert_close(sigma @ sigma.T, scheme.lr * covariance, rtol=0, atol=1e-9)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("size", "m"), [(1, 1), (2, 2), (6, 6), (4, 2), (6, 3), (4, 1)])
def test_usams_drift_descends_the_published_regulariser(size, m, replacement):
    """f + rho/2 norm(grad f)^2 + rho c / (2 m) tr V, c the finite-population factor or 1: theorems 3.3 and 3.5."""
    A, b, x = finite_sum(7)
    rule = Micro(m, Rule(geometry=Unnormalised()))
    c = 1.0 if replacement else (n - m) / (n - 1)
    drift = Equation(quadratic(A, b), Scheme(rule, 0.1, 0.3, size, replacement)).drift(x)
    torch.testing.assert_close(drift, -regularised_gradient(A, b, x, 0.3, c / m), rtol=0, atol=1e-9)
    if m < n:
        wrong = -regularised_gradient(A, b, x, 0.3, (1.0 if not replacement else (n - m) / (n - 1)) / m)
        assert m == 1 or (drift - wrong).norm() > 1e-3


def test_n_forms_have_no_variance_term():
    A, b, x = finite_sum(8)
    H, g = A.mean(0), A.mean(0) @ x + b.mean(0)
    for rule, v in ((RULES["n-USAM"], g), (RULES["n-SAM"], g / g.norm())):
        drift = Equation(quadratic(A, b), Scheme(rule, 0.1, 0.3, 2)).drift(x)
        torch.testing.assert_close(drift, -(g + 0.3 * H @ v), rtol=0, atol=1e-9)


def test_with_one_hessian_m_usam_does_not_depend_on_m():
    A, b, x = finite_sum(9, one_hessian=True)
    drifts = [
        Equation(quadratic(A, b), Scheme(Micro(m, Rule(geometry=Unnormalised())), 0.1, 0.3, 6)).drift(x)
        for m in (1, 2, 3, 6)
    ]
    for drift in drifts[1:]:
        torch.testing.assert_close(drift, drifts[0], rtol=0, atol=1e-12)
    A, b, x = finite_sum(9)
    one, whole = (
        Equation(quadratic(A, b), Scheme(Micro(m, Rule(geometry=Unnormalised())), 0.1, 0.3, 6)).drift(x) for m in (1, 6)
    )
    assert (one - whole).norm() > 0.1


@pytest.mark.parametrize("name", [name for name in RULES if name != "SGD"])
def test_off_quadratics_the_drift_is_exact_up_to_rho_squared(name):
    problem, x = logistic_problem()
    residuals = []
    for rho in (0.02, 0.01):
        scheme = Scheme(RULES[name], 0.1, rho, SIZE)
        residuals.append((Equation(problem, scheme).drift(x) + real_updates(problem, scheme, x).mean(0)).norm())
    assert residuals[1] > 1e-9
    assert torch.log2(residuals[0] / residuals[1]).item() == pytest.approx(2, abs=0.1)


def test_the_correction_is_the_usual_one():
    """-lr/4 grad norm(grad f)^2, for SGD (Li, Tai and E)."""
    problem, x = logistic_problem()
    scheme = Scheme(Plain(), 0.2, 0.0, 2)
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(problem.losses(x).mean(), x, create_graph=True)
    (term,) = torch.autograd.grad(0.2 / 4 * g.square().sum(), x)
    torch.testing.assert_close(Equation(problem, scheme, corrected=True).drift(x.detach()), -(g + term).detach())


def test_many_paths_are_what_the_optimizers_do_one_by_one():
    problem, x0 = logistic_problem()
    paths = x0 + 0.3 * torch.randn(3, 2, dtype=torch.float64)
    index = torch.stack([torch.randperm(5)[:SIZE] for _ in range(3)])
    for make in (
        lambda base, m: steppe.SAM(base, 0.1, m=m),
        lambda base, m: steppe.USAM(base, 0.1, m=m),
    ):
        for m in (None, 2):
            rule = make(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2), m).rule
            scheme = Scheme(rule, 0.2, 0.1, SIZE)
            moved = RealPaths(problem, scheme, paths)
            moved.step(index)
            together = moved.step(index.flip(0))
            for p in range(3):
                model = torch.nn.Linear(2, 1, bias=False).double()
                model.weight = torch.nn.Parameter(paths[p].clone())
                optimizer = make(torch.optim.SGD(model.parameters(), lr=0.2), m)
                for rows in (index[p], index.flip(0)[p]):
                    data = {name: t[rows] for name, t in problem.data.items()}
                    loss = torch.func.vmap(problem.loss, (None, 0))
                    optimizer.step(steppe.Batch(model, lambda model, data, loss=loss: loss(model.weight, data), data))
                torch.testing.assert_close(together[p], model.weight.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("size", "m"), [(4, 2), (4, 4), (4, 1), (2, 1)])
def test_the_covariance_of_the_mixing_weights(size, m, replacement):
    found = sampling(4, Scheme(Micro(m, Rule()), 0.1, 0.1, size, replacement))
    parts = {tuple(row): u for u, row in enumerate((found.parts * m).round().int().tolist())}
    batches = all_batches(4, size, replacement, ordered=True).view(-1, size // m, m)
    B = torch.zeros(len(batches), len(parts), dtype=torch.float64)
    for c, batch in enumerate(batches):
        for part in batch:
            B[c, parts[tuple(torch.bincount(part, minlength=4).tolist())]] += m / size
    torch.testing.assert_close(found.mean, B.mean(0), rtol=0, atol=1e-12)
    expected = (B - B.mean(0)).T @ (B - B.mean(0)) / len(B)
    torch.testing.assert_close(found.factor @ found.factor.T, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(geometry=steppe.Adaptive()), r"no equation for a rule with geometry=Adaptive\("),
        (Rule(sample=steppe.Reweighted()), r"no equation for a rule with sample=Reweighted\("),
        (Rule(select=steppe.Sharpest(0.5)), r"no equation for a rule with select=Sharpest\("),
        (Rule(combine=steppe.SurrogateGap(0.4)), r"no equation for a rule with combine=SurrogateGap\("),
        (steppe.Every(5, Rule(), Rule()), r"no equation for the rule Every\("),
        (Micro(3, Rule()), "size must be a multiple of m, got 4 examples in micro-batches of 3"),
        (Micro(2, Rule(OnFull())), "no equation for micro-batches of the n-form"),
    ],
)
def test_a_rule_without_an_equation_is_named(rule, message):
    with pytest.raises(SDEError, match=message):
        Scheme(rule, 0.1, 0.05, SIZE)


def test_what_cannot_be_enumerated_is_refused():
    A, b, _ = finite_sum()
    with pytest.raises(SDEError, match="size must be at most the number of examples, got batches of 7 out of 6"):
        Equation(quadratic(A, b), Scheme(Plain(), 0.1, 0.0, 7))
    many = quadratic(A[:1].expand(40, d, d), b[:1].expand(40, d))
    with pytest.raises(SDEError, match="91390 micro-batches of 4 out of 40 examples are too many"):
        Equation(many, Scheme(Rule(), 0.1, 0.1, 4))


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        (lambda x, row: row @ x, torch.zeros(0, 2), "at least one example"),
        (lambda x, row: row @ x, "text", "tensors with a common first dimension"),
        (lambda x, row: row * x, torch.ones(3, 2), "one number per example"),
        (
            lambda x, row: torch.log(row @ x),
            torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
            "the loss of example 1 is not finite",
        ),
        (lambda x, row: (row @ x) * torch.rand(()), torch.ones(3, 2), "deterministic torch operations"),
    ],
)
def test_a_bad_problem_is_named(loss, data, message):
    with pytest.raises(SDEError, match=message):
        FiniteSum(loss, data).check(torch.ones(2))
