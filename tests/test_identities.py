"""What methods.md and the papers say must coincide."""

import pytest
import torch
from torch import nn

import steppe
from steppe import Everything, FiniteDifference, Reweighted, Rule, SharpnessAware
from tests.cases import BASES, N, World, assert_close, each_base, flat, sgd, world
from tests.exact import A4, B4, ExactNorms, Quadratic

RHO = 0.2


def path(make, base: str = "momentum", steps: int = 5, w: World | None = None) -> torch.Tensor:
    w = w or world()
    opt = make(BASES[base](w.parameters()), w)
    points = []
    for batch in w.batches(steps):
        opt.step(batch)
        points.append(flat(w))
    return torch.stack(points)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(a, b, rtol=0, atol=tolerance)


SAM = lambda base, w: steppe.SAM(base, RHO)  # noqa: E731
PLAIN = lambda base, w: base  # noqa: E731


@each_base
@pytest.mark.parametrize("method", [steppe.WSAM, steppe.CoupledWSAM])
def test_wsam_gamma_zero_is_the_base(method, base: str) -> None:
    assert same(path(lambda b, w: method(b, RHO, 0.0), base), path(PLAIN, base))


@each_base
def test_coupled_one_half_is_sam_beside_any_base(base: str) -> None:
    assert same(path(lambda b, w: steppe.CoupledWSAM(b, RHO, 0.5), base), path(SAM, base))


def test_decoupled_one_half_is_sam_for_plain_sgd_only() -> None:
    half = lambda b, w: steppe.WSAM(b, RHO, 0.5)  # noqa: E731
    assert same(path(half, "sgd"), path(SAM, "sgd"))
    ours, sams = path(half, "momentum"), path(SAM, "momentum")
    assert same(ours[0], sams[0])
    assert not same(ours[1], sams[1], 1e-5)
    assert not same(path(half, "adam")[0], path(SAM, "adam")[0], 1e-5)


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_coupled_is_decoupled_for_plain_sgd(gamma: float) -> None:
    coupled = lambda b, w: steppe.CoupledWSAM(b, RHO, gamma)  # noqa: E731
    decoupled = lambda b, w: steppe.WSAM(b, RHO, gamma)  # noqa: E731
    assert same(path(coupled, "sgd"), path(decoupled, "sgd"))
    assert same(path(coupled, "momentum")[0], path(decoupled, "momentum")[0])


@pytest.mark.parametrize("base", ["momentum", "adam"])
def test_on_a_quadratic_coupled_wsam_is_sam_with_a_longer_radius(base: str) -> None:
    def end(make):
        model = Quadratic((1.0, 1.0))
        opt = make(BASES[base](list(model.parameters())))
        for _ in range(6):
            opt.step(model.batch(A4, B4))
        return model.weight.detach()

    ours = end(lambda b: steppe.CoupledWSAM(b, 0.2, 0.8))
    assert same(ours, end(lambda b: steppe.SAM(b, 0.8)), 1e-9)


@each_base
def test_methods_that_contain_sam(base: str) -> None:
    sam = path(SAM, base)
    twins = {
        "m = n": lambda b, w: steppe.SAM(b, RHO, m=N),
        "m > n": lambda b, w: steppe.SAM(b, RHO, m=10 * N),
        "unified": lambda b, w: steppe.UnifiedSAM(b, RHO, lam=1.0),
        "fisher": lambda b, w: steppe.FisherSAM(b, RHO, eta=0.0),
        "gsam": lambda b, w: steppe.GSAM(b, RHO, alpha=0.0),
        "esam": lambda b, w: steppe.ESAM(b, RHO, beta=1.0, gamma=1.0),
        "esam with choice of all": lambda b, w: SharpnessAware(b, Rule(select=_all_by_index), RHO),
        "rwsam lam 0": lambda b, w: steppe.RWSAM(b, RHO, lam=0.0),
        "looksam k 1": lambda b, w: steppe.LookSAM(b, RHO, k=1),
        "fsam sigma 0": lambda b, w: steppe.FSAM(b, RHO, sigma=0.0),
        "vasso theta 1": lambda b, w: steppe.VaSSO(b, RHO, theta=1.0),
    }
    for name, make in twins.items():
        assert same(path(make, base), sam, 1e-9), name


def _all_by_index(f):
    return torch.arange(N)


@each_base
def test_first_steps_are_sams(base: str) -> None:
    sam = path(SAM, base, steps=1)
    assert same(path(lambda b, w: steppe.FSAM(b, RHO), base, 1), sam)
    assert same(path(lambda b, w: steppe.VaSSO(b, RHO, 0.3), base, 1), sam)


@each_base
def test_unified_zero_is_usam(base: str) -> None:
    usam = path(lambda b, w: steppe.USAM(b, RHO), base)
    assert same(path(lambda b, w: steppe.UnifiedSAM(b, RHO, lam=0.0), base), usam)


def test_looksam_without_reuse_is_the_base_between() -> None:
    def alternate(b, w):
        return SharpnessAware(b, steppe.Every(2, Rule()), RHO)

    assert same(path(lambda b, w: steppe.LookSAM(b, RHO, k=2, alpha=0.0)), path(alternate))
    periodic = path(lambda b, w: steppe.SAM(b, steppe.schedule.Periodic(RHO, every=2)))
    assert same(path(alternate), periodic)


def test_n_sam_on_the_batch_itself_is_sam() -> None:
    w = world()
    opt = steppe.NSAM(sgd(w), RHO, full=w.batch)
    opt.step(w.batch)
    twin = world()
    steppe.SAM(sgd(twin), RHO).step(twin.batch)
    assert_close(w, twin, atol=1e-12)


def test_usam_is_sam_with_the_radius_times_the_norm() -> None:
    w = world()
    usam = steppe.USAM(sgd(w), RHO)
    usam.step(w.batch)
    twin = world()
    steppe.SAM(sgd(twin), RHO * float(usam.telemetry.g_norm)).step(twin.batch)
    assert_close(w, twin, atol=1e-12)


def test_rw_sam_with_equal_gradients_is_sam_for_every_lambda() -> None:
    for lam in (0.0, 1.0, 50.0):
        ends = []
        for make in (lambda b: steppe.SAM(b, 0.5), lambda b, lam=lam: steppe.RWSAM(b, 0.5, lam)):
            model = Quadratic((1.0, -2.0))
            opt = make(sgd(model))
            for _ in range(3):
                opt.step(model.batch(A4[2:3] * 4, B4[2:3] * 4))
            ends.append(model.weight.detach())
        assert same(*ends, 1e-12)


def test_rw_sam_with_infinite_lambda_follows_the_largest_norm() -> None:
    ends = []
    g = torch.tensor([2.0, 7.0], dtype=torch.float64)  # the largest of the four at (1, 1)
    eps = 0.5 * g / g.norm()
    model = Quadratic((1.0, 1.0))
    batch = model.batch(A4, B4)
    rule = Rule(sample=Reweighted(1e6, ExactNorms()))
    SharpnessAware(sgd(model), rule, 0.5).step(batch)
    ends.append(model.weight.detach())
    w = 1 + eps
    A, b = torch.tensor(A4, dtype=torch.float64), torch.tensor(B4, dtype=torch.float64)
    assert same(ends[0], 1 - 0.1 * (A @ w + b).mean(0), 1e-9)


def test_asam_on_unit_weights() -> None:
    for eta, radius in ((0.0, RHO), (0.5, 1.5 * RHO)):
        ends = []
        for make in (
            lambda b, eta=eta: steppe.ASAM(b, RHO, eta, on=Everything()),
            lambda b, radius=radius: steppe.SAM(b, radius),
        ):
            model = Quadratic((1.0, -1.0))
            make(sgd(model)).step(model.batch(A4, B4))
            ends.append(model.weight.detach())
        assert same(*ends)


def test_asam_does_not_see_the_scale_of_layers() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    perturbed = []
    for c in (1.0, 7.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
        with torch.no_grad():
            model[0].weight.mul_(c)
            model[2].weight.div_(c)
        batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)
        opt = steppe.ASAM(sgd(model), 0.5, eta=0.0)
        opt.step(batch)
        perturbed.append(opt.telemetry.loss_adv)
    torch.testing.assert_close(*perturbed, rtol=1e-9, atol=0)


def test_gsam_geometry() -> None:
    w = world()
    f = SharpnessAware(sgd(w), Rule(combine=steppe.SurrogateGap(0.4)), RHO)._stepper.oracle(w.batch)
    with f.at(Rule().perturbation(f)):
        g_adv = f.grad()
    u = steppe.SurrogateGap(0.4)(f, g_adv).grad
    across = f.g - steppe.pieces.combine.projection(f.g, onto=g_adv)
    assert abs(across.dot(g_adv)) < 1e-12
    torch.testing.assert_close(u.dot(g_adv), g_adv.norm() ** 2)
    zero = g_adv * 0.0
    assert steppe.pieces.combine.projection(f.g, onto=zero).norm() == 0


@pytest.mark.parametrize("name", ["SAM", "ASAM", "GSAM", "WSAM", "FSAM", "VaSSO", "LookSAM"])
def test_scaling_the_loss_scales_the_update_and_not_the_perturbation(name: str) -> None:
    ends, eps = [], []
    for c in (1.0, 128.0):
        w = world()
        w.criterion = lambda out, y, c=c: c * nn.functional.cross_entropy(out, y, reduction="none")
        opt = getattr(steppe, name)(torch.optim.SGD(w.parameters(), lr=0.1 / c), RHO)
        opt.step(w.batch)
        ends.append(flat(w))
        eps.append(opt.telemetry.eps_norm)
    assert same(*ends, 1e-11)
    torch.testing.assert_close(*eps)


def test_a_zero_gradient_is_no_perturbation() -> None:
    for name in ("SAM", "ASAM", "FisherSAM", "GSAM", "WSAM", "LookSAM", "FSAM", "VaSSO", "USAM", "UnifiedSAM", "RWSAM"):
        model = Quadratic((0.0, 0.0))
        opt = getattr(steppe, name)(sgd(model), 0.5)
        for _ in range(3):
            opt.step(model.batch(A4[:1], B4[:1]))
        assert model.weight.tolist() == [0.0, 0.0], name
        assert opt.telemetry.skipped == 0


def test_wsams_steady_weight_under_momentum() -> None:
    """Beside a momentum buffer the sharpness term weighs (1 - mu) gamma / (1 - gamma) against the loss."""
    mu, gamma, lr, slope, tilt = 0.9, 0.9, 1e-3, 2.0, 0.7

    def rule(f):  # constant g and g_adv - g
        g = steppe.Vector([torch.tensor([slope], dtype=torch.float64)])
        g_adv = steppe.Vector([torch.tensor([slope + tilt], dtype=torch.float64)])
        f.g, f.passes.log.any_gradient = g, True
        return steppe.Weighted(gamma)(f, g_adv)

    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = SharpnessAware(torch.optim.SGD([p], lr=lr, momentum=mu), rule)
    places = []
    for _ in range(400):
        opt.step(lambda: torch.zeros(()))
        places.append(p.item())
    moved = places[-1] - places[-2]
    assert moved == pytest.approx(-lr / (1 - mu) * (slope + (1 - mu) * gamma / (1 - gamma) * tilt))


def test_probe_ranks_examples_like_their_gradient_norms() -> None:
    """Many probes and a small length tend to the exact norms, up to the curvature term."""
    w = world()
    opt = SharpnessAware(sgd(w, lr=0.0), Rule(), RHO)
    f = opt._stepper.oracle(w.batch)
    exact = ExactNorms()(f)
    probed = FiniteDifference(length=1e-3, probes=400)(f)
    torch.testing.assert_close(probed, exact, rtol=0.15, atol=0)
