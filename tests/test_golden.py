"""Numbers that the authors' code gives, and closed forms on quadratics."""

import math

import pytest
import torch

import steppe
from steppe import Adaptive, Everything, FiniteDifference, Oracle, Reweighted, Rule, SharpnessAware
from steppe.engine.parameters import Parameters, Radii
from tests.cases import sgd, sgdm
from tests.exact import A4, B4, ExactNorms, Quadratic

ADAM = lambda p: torch.optim.Adam(p, lr=0.1)  # noqa: E731

TABLE = {
    "SAM": (sgd, lambda b: steppe.SAM(b, 0.5), [(0.61, 0.44), (0.3188863934, 0.1253625154), (0.0903653221, -0.0176337049)]),
    "WSAM 1/2, SGD": (sgd, lambda b: steppe.WSAM(b, 0.5, 0.5), [(0.61, 0.44), (0.3188863934, 0.1253625154), (0.0903653221, -0.0176337049)]),
    "SAM, SGDM": (sgdm, lambda b: steppe.SAM(b, 0.5), [(0.61, 0.44), (-0.0321136066, -0.3786374846), (-0.5908594864, -0.7643596288)]),
    "coupled 1/2, SGDM": (sgdm, lambda b: steppe.CoupledWSAM(b, 0.5, 0.5), [(0.61, 0.44), (-0.0321136066, -0.3786374846), (-0.5908594864, -0.7643596288)]),
    "decoupled 1/2, SGDM": (sgdm, lambda b: steppe.WSAM(b, 0.5, 0.5), [(0.61, 0.44), (0.0488863934, -0.2346374846), (-0.396637714, -0.4255804293)]),
    "SAM, Adam": (ADAM, lambda b: steppe.SAM(b, 0.5), [(0.9000000003, 0.9000000002), (0.8002882707, 0.8002614698), (0.7010947481, 0.7009900487)]),
    "coupled 1/2, Adam": (ADAM, lambda b: steppe.CoupledWSAM(b, 0.5, 0.5), [(0.9000000003, 0.9000000002), (0.8002882707, 0.8002614698), (0.7010947481, 0.7009900487)]),
    "GSAM": (sgd, lambda b: steppe.GSAM(b, 0.5, 0.4), [(0.6157719562, 0.4359802448), (0.326274461, 0.1202338323)]),
    "USAM": (sgd, lambda b: steppe.USAM(b, 0.5), [(0.25, -0.2), (0.0625, 0.04)]),
    "unified": (sgd, lambda b: steppe.UnifiedSAM(b, 0.5, 0.5), [(0.43, 0.12), (0.1339583612, -0.0108733712)]),
    "ASAM": (sgd, lambda b: steppe.ASAM(b, 0.5, 0.01, on=Everything()), [(0.6091, 0.4384)]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_authors_numbers(name: str) -> None:
    base, make, path = TABLE[name]
    model = Quadratic((1.0, 1.0))
    opt = make(base(model.parameters()))
    batch = model.batch([[[3, 0], [0, 4]]], [[0, 0]])
    for w in path:
        opt.step(batch)
        torch.testing.assert_close(model.weight.detach(), torch.tensor(w, dtype=torch.float64), rtol=0, atol=2e-10)


@pytest.mark.parametrize(("m", "u"), [(4, (4.040243246, 5.784291267)), (2, (4.093248561, 5.90837552)), (None, (4.040243246, 5.784291267))])  # fmt: skip
def test_m_sam_on_four_examples(m: int | None, u: tuple[float, float]) -> None:
    model = Quadratic((1.0, 1.0))
    opt = steppe.SAM(sgd(model, lr=1.0), 0.5, m=m)
    opt.step(model.batch(A4, B4))
    torch.testing.assert_close(1 - model.weight.detach(), torch.tensor(u, dtype=torch.float64), rtol=0, atol=1e-9)


def four_examples(rho: float = 0.5) -> tuple[Quadratic, Oracle]:
    model = Quadratic((1.0, 1.0))
    return model, Oracle(model.batch(A4, B4), Parameters([model.weight], Radii([rho])))


def test_rw_sam_weights_from_exact_norms() -> None:
    _, f = four_examples()
    p = Reweighted(0.5).weights(ExactNorms()(f))
    expected = torch.tensor([0.149643316, 0.467925697, 0.181424026, 0.201006962], dtype=torch.float64)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)


def test_the_finite_difference_is_the_directional_derivative_and_half_the_curvature() -> None:
    model, f = four_examples()
    probe = FiniteDifference(length=1e-3 * math.sqrt(2) / 0.5)  # delta = 1e-3
    z = probe.direction(f.w, 0).tensors[0]
    assert z.abs().tolist() == [1.0, 1.0]
    A, b = torch.tensor(A4, dtype=torch.float64), torch.tensor(B4, dtype=torch.float64)
    slope = (A @ model.weight.detach() + b) @ z
    expected = (slope + 0.5e-3 * torch.einsum("i,nij,j->n", z, A, z)).abs()
    torch.testing.assert_close(probe(f), expected, rtol=0, atol=1e-9)
    slopes = {(1.0, 1.0): (7, 9, 7, 6.5), (1.0, -1.0): (1, 5, 3, 4.5)}[tuple((z * z[0]).tolist())]
    assert slope.abs().tolist() == pytest.approx(slopes)


def test_several_probes_join_by_the_root_mean_square() -> None:
    model, f = four_examples()
    probe = FiniteDifference(length=1e-6, probes=64)
    g = torch.tensor(A4, dtype=torch.float64) @ model.weight.detach() + torch.tensor(B4, dtype=torch.float64)
    z = torch.stack([probe.direction(f.w, k).tensors[0] for k in range(64)])
    assert len({tuple(row.tolist()) for row in z}) == 4  # both signs, both coordinates
    torch.testing.assert_close(probe(f), (z @ g.T).square().mean(0).sqrt(), rtol=1e-4, atol=1e-4)


def test_the_probe_is_as_long_as_it_says() -> None:
    model, f = four_examples(rho=0.5)
    probe, seen = FiniteDifference(length=0.1), []
    losses = f.losses

    def watched():
        seen.append(model.weight.detach().clone())
        return losses()

    f.losses = watched
    probe(f)
    assert (seen[0] - 1).norm().item() == pytest.approx(0.1 * 0.5)
    assert seen[1].tolist() == [1.0, 1.0]


def test_sam_in_one_dimension_ends_in_a_two_cycle() -> None:
    a, lr, rho = 2.0, 0.3, 0.1
    for make, radius in ((lambda b: steppe.SAM(b, rho), rho), (lambda b: steppe.WSAM(b, rho, 0.75), 3 * rho)):
        model = Quadratic((1.0,))
        opt = make(sgd(model, lr=lr))
        for _ in range(300):
            opt.step(model.batch([[[a]]], [[0.0]]))
        assert abs(model.weight.item()) == pytest.approx(lr * a * radius / (2 - lr * a), rel=1e-9)
    model = Quadratic((1.0,))
    opt = steppe.USAM(sgd(model, lr=lr), rho)
    for _ in range(300):
        opt.step(model.batch([[[a]]], [[0.0]]))
    assert abs(model.weight.item()) < 1e-12


def closed_forms():
    torch.manual_seed(3)
    M = torch.randn(6, 6, dtype=torch.float64)
    A, b, w = M @ M.T, torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    g = A @ w - b
    T = w.abs() + 0.01
    F = 1 + 2.0 * g * g
    rho, unit = 0.3, g / g.norm()
    eps = rho * (g / F) / torch.sqrt(g @ (g / F))
    g_adv = g + rho * A @ unit
    across = g - (g @ g_adv) / (g_adv @ g_adv) * g_adv
    return A, b, w, {
        "SAM": (steppe.SAM, {}, g_adv),
        "USAM": (steppe.USAM, {}, g + rho * A @ g),
        "UnifiedSAM": (steppe.UnifiedSAM, {"lam": 0.2}, g + rho * A @ (0.8 * g + 0.2 * unit)),
        "WSAM": (steppe.WSAM, {"gamma": 0.8}, g + 4 * rho * A @ unit),
        "CoupledWSAM": (steppe.CoupledWSAM, {"gamma": 0.8}, g + 4 * rho * A @ unit),
        "ASAM": (steppe.ASAM, {"eta": 0.01, "on": Everything()}, g + rho * A @ (T**2 * g) / (T * g).norm()),
        "ASAM-vectors-are-plain": (steppe.ASAM, {"eta": 0.01}, g_adv),
        "FisherSAM": (steppe.FisherSAM, {"eta": 2.0}, g + A @ eps),
        "GSAM": (steppe.GSAM, {"alpha": 0.3}, g_adv - 0.3 * across),
    }  # fmt: skip


@pytest.mark.parametrize("name", closed_forms()[3])
def test_closed_forms(name: str) -> None:
    A, b, w, forms = closed_forms()
    method, hyper, u = forms[name]
    model = Quadratic(w.tolist())
    method(sgd(model, lr=0.01), rho=0.3, **hyper).step(model.batch(A[None], -b[None]))
    torch.testing.assert_close(model.weight.detach(), w - 0.01 * u, rtol=1e-11, atol=1e-11)


def test_asam_and_fisher_stay_in_their_ball() -> None:
    torch.manual_seed(1)
    w, g = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    f = Oracle(lambda: None, Parameters([w.requires_grad_()], Radii([0.3])))
    w = w.detach()
    d = steppe.Vector([g])
    eps = (0.3 * Adaptive(0.05, Everything())(f, d)).materialised()[0]
    assert (eps / (w.abs() + 0.05)).norm().item() == pytest.approx(0.3)
    eps = (0.3 * steppe.Fisher(1.7)(f, d)).materialised()[0]
    assert (eps @ ((1 + 1.7 * g * g) * eps)).item() == pytest.approx(0.09)


def test_asam_by_name_is_the_authors_choice() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,))
    closure = steppe.Batch.supervised(model, torch.nn.CrossEntropyLoss(reduction="none"), x, y)
    closure()
    g = {name: p.grad.clone() for name, p in model.named_parameters()}
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    T = {name: p.abs() + 0.1 if "weight" in name else torch.ones_like(p) for name, p in w.items()}
    norm = torch.sqrt(sum((T[name] * g[name]).square().sum() for name in g))
    for p, name in zip(model.parameters(), w, strict=True):
        with torch.no_grad():
            p.add_(0.5 * T[name] ** 2 * g[name] / norm)
    closure()
    expected = {name: w[name] - 0.1 * p.grad for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(w[name])
    opt = steppe.ASAM(torch.optim.SGD(model.named_parameters(), lr=0.1), 0.5, 0.1, on=steppe.Named("weight"))
    opt.step(closure)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-12)
    unnamed = SharpnessAware(sgd(model), Rule(geometry=Adaptive(0.1, steppe.Named())))
    with pytest.raises(TypeError, match="named_parameters"):
        unnamed.step(closure)
