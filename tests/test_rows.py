"""The methods of 2023 to 2026 in numbers: their authors' code, and closed forms on quadratics.

The numbers of the authors' code were made by running it on ``(3 x^2 + 4 y^2) / 2`` from (1, 1) with lr 0.1 and rho 0.5,
in float64: XSAM (Cccjl219/XSAM 15f9c6f), Momentum-SAM (MarlonBecker/MSAM 780fa4f, the weights without their
perturbation), Lookbehind (chandar-lab/Lookbehind-SAM), Eigen-SAM (RitianLuo/EigenSAM, with the eigenvector that five
steps of power iteration from g give) and X-SAM (huang5467/X-SAM f69c21b, from -g_adv, as the sign is of no meaning).
"""

import pytest
import torch
from torch import Tensor, nn

import steppe
from steppe import BothWeighted, ByClass, EigenCorrected, Oracle, Rule, SharpnessAware, Stale, Update
from steppe.engine.checks import KEPT, check_state
from steppe.engine.parameters import Parameters, Radii
from steppe.pieces.protocol import Declaration
from tests.cases import KeepingSGD, N, reading, sgd, sgdm, world
from tests.exact import A4, B4, ExactNorms, Quadratic

A = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
AUTHORS = {
    "MSAM": (sgdm, lambda b: steppe.MomentumSAM(b, 0.5), [(0.7, 0.6), (0.31, 0.16), (-0.0345038728, -0.1503306121)]),
    "XSAM 0.5": (sgd, lambda b: steppe.XSAM(b, 0.5, alpha=0.5), [(0.6002115193, 0.4469455987), (0.3045119765, 0.1357349127), (0.0780316984, -0.0116517968)]),
    "XSAM 1.5": (sgd, lambda b: steppe.XSAM(b, 0.5, alpha=1.5), [(0.6199091199, 0.4332276269), (0.3333412498, 0.1151081640), (0.1018069671, -0.0228293666)]),
    "XSAM": (sgd, lambda b: steppe.XSAM(b, 0.5, every=1), [(0.6299358139, 0.4266305744), (0.3478488781, 0.1049955477)]),
    "Lookbehind": (sgd, lambda b: steppe.LookbehindSAM(b, 0.5), [(0.5671379684, 0.3579393584), (0.2279735003, 0.0169436976)]),
    "Eigen-SAM": (sgd, lambda b: steppe.EigenSAM(b, 0.5), [(0.6208128911, 0.4291871088), (0.3365812565, 0.1041616780), (0.1065966065, -0.0449693894)]),
    "X-SAM": (sgd, lambda b: SharpnessAware(b, Rule(combine=EigenCorrected()), 0.5), [(0.9399064925, 0.9001248273), (0.8783670465, 0.8014505103), (0.8152163594, 0.7041731363)]),
}  # fmt: skip


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def on_quadratic(make, base=sgd, steps: int = 1, lr: float = 0.1) -> list[Tensor]:
    model = Quadratic((1.0, 1.0))
    opt, batch, path = make(base(model, lr=lr)), model.batch(A[None], torch.zeros(1, 2)), []
    for _ in range(steps):
        opt.step(batch)
        path.append(model.weight.detach().clone())
    return path


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_numbers(name: str) -> None:
    base, make, path = AUTHORS[name]
    for found, expected in zip(on_quadratic(make, base, len(path)), path, strict=True):
        torch.testing.assert_close(found, vector(*expected), rtol=0, atol=1e-9)


def test_focal_sam_as_its_authors() -> None:
    """The numbers were made by running scongl/Focal-SAM 86c13c6 on the same weights, data and counts."""
    model = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]], dtype=torch.float64))
    x = torch.tensor([[1, 2], [-1, 0.5], [0.3, -0.7], [2, -1]], dtype=torch.float64)
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, torch.tensor([0, 1, 2, 0]))
    opt = SharpnessAware(sgd(model), BothWeighted(ByClass((5, 3, 2))), 0.5)
    for row in ((0.14845912999216712, -0.16315165827152095), (0.1944272791866089, -0.12641922299653582)):
        opt.step(batch)
        torch.testing.assert_close(model.weight[0].detach(), vector(*row), rtol=0, atol=1e-12)
    assert opt.telemetry.passes == 3


@pytest.mark.parametrize("y", [torch.zeros(4), torch.zeros(4, 3), torch.zeros(4, dtype=torch.int32)])
def test_weights_by_class_need_class_numbers(y: Tensor) -> None:
    model = nn.Linear(2, 3)
    batch = steppe.Batch.supervised(model, lambda out, t: out.sum(1), torch.ones(4, 2), y)
    with pytest.raises(TypeError, match="targets are class numbers"):
        SharpnessAware(sgd(model), BothWeighted(ByClass((1, 1, 1)))).step(batch)
    for counts in ((), (0, 0), (2, -1)):
        with pytest.raises(ValueError, match="counts must hold"):
            ByClass(counts)


def test_async_sam_ascends_by_the_gradient_of_the_step_before() -> None:
    path = on_quadratic(lambda b: SharpnessAware(b, Rule(Stale()), 0.5), steps=2)
    torch.testing.assert_close(path[0], vector(0.61, 0.44))  # SAM: there is no step before
    torch.testing.assert_close(path[1], path[0] - 0.1 * A @ (path[0] + 0.5 * vector(0.6, 0.8)))


def test_lookbehind_with_a_share_for_every_tensor_as_its_authors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(vector(1.0, 1.0))
            self.b = nn.Parameter(vector(2.0))

    model = Two()
    loss = lambda m, d: 0.5 * (m.weight @ A @ m.weight + 1.5 * m.b.square().sum()) + 0 * d  # noqa: E731
    opt = steppe.LookbehindSAM(sgd(model), 0.5, alpha=None)
    for w, b in (((0.1690905394, -0.2198067597), 1.2884428868961155), ((-0.0420182920, 0.2219978784), 0.7084701415)):  # fmt: skip
        opt.step(steppe.Batch(model, loss, torch.zeros(1, dtype=torch.float64)))
        torch.testing.assert_close(model.weight.detach(), vector(*w), rtol=0, atol=1e-9)
        torch.testing.assert_close(model.b.detach(), vector(b), rtol=0, atol=1e-9)


def test_closed_forms_of_one_step() -> None:
    """g = (3, 4), norm 5; SAM's eps is (0.3, 0.4) and g_adv is (3.9, 5.6)."""
    g, g_adv = vector(3, 4), vector(3.9, 5.6)
    close = lambda make, u, **more: torch.testing.assert_close(1 - on_quadratic(make, lr=1.0, **more)[0], u)  # noqa: E731
    close(lambda b: steppe.SSAM(b, 0.5), 5 * g_adv / g_adv.norm())
    close(lambda b: steppe.LESAM(b, 0.5, sigma=10.0), g_adv)  # the budget is not the limit
    close(lambda b: steppe.LESAM(b, 0.5, sigma=1.0), g + A @ (0.2 * g / 5))  # rho_t = sigma / norm(g) = 0.2
    close(lambda b: steppe.GCSAM(b, 0.5), g_adv)  # a vector is not centralised
    close(lambda b: reading(steppe.PreconditionedSAM)(b, None, 0.5), g_adv)  # before the base's first step
    close(lambda b: reading(steppe.MomentumSAM)(b, None, 0.5), g)  # as here
    clipped = g / 5 + 3 * (g_adv / g_adv.norm() - g / 5)  # gamma / (1 - gamma) = 3; the code adds 1e-6 to the norms
    found = on_quadratic(lambda b: steppe.WSAM(b, 0.5, 0.75, clip_each=1.0), lr=1.0)[0]
    torch.testing.assert_close(1 - found, clipped, rtol=0, atol=2e-6)


def test_saner_in_the_numbers_of_its_authors() -> None:
    """Entries between 0 and 1 times g's: the first of step 1, the second of step 2, none of step 3."""
    path = [(0.961180339887494, 0.6658359213500726), (0.7137200835207204, 0.6308191992570423), (0.6098658351333339, 0.42785323912445117)]  # fmt: skip
    model = Quadratic((1.0, 1.0))
    batch = model.batch(torch.tensor([[[3.0, -2.0], [-2.0, 4.0]]], dtype=torch.float64), torch.zeros(1, 2))
    opt = steppe.SANER(sgd(model), 0.5, alpha=steppe.schedule.Linear(0.5, 0.5, 9))
    for point in path:
        opt.step(batch)
        torch.testing.assert_close(model.weight.detach(), vector(*point), rtol=0, atol=1e-8)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha must be a number in \[0, 1\]"):
            steppe.SANER(sgd(model), alpha=alpha)
        with pytest.raises(ValueError, match=r"alpha must be"):
            steppe.SANER(sgd(model), alpha=lambda step, group, alpha=alpha: alpha).step(batch)


def test_saner_keeps_a_gradient_that_w_does_not_have() -> None:
    class Sleeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.a**2 + (self.b if self.a > 1 else 0) + 0 * x.sum(1)

    model = Sleeper()
    opt = steppe.SANER(sgd(model, lr=1.0), 0.1, alpha=1.0)
    opt.step(steppe.Batch(model, lambda m, x: m(x), torch.zeros(3, 1)))
    assert model.b.item() == 0


def test_light_sams_radius_shrinks_with_the_gradients_so_far() -> None:
    model = Quadratic((1.0, 1.0))
    opt = steppe.LightSAM(sgd(model), 0.5)
    w, squares = vector(1, 1), 0.0
    for _ in range(3):
        g = A @ w
        squares += float(g @ g)
        w = w - 0.1 * A @ (w + 0.5 * g / squares**0.5)
        opt.step(model.batch(A[None], torch.zeros(1, 2)))
        torch.testing.assert_close(model.weight.detach(), w)
        torch.testing.assert_close(opt.telemetry.eps_norm, 0.5 * g.norm() / squares**0.5)
    assert opt.param_groups[0]["sharpness.squares"] == pytest.approx(squares)


def test_gams_second_term_is_the_gradient_of_the_gradients_norm() -> None:
    """On a quadratic rho H g / norm(g) is rho times the gradient of norm(g), exactly."""
    eps = 0.5 * A @ A @ vector(1, 1) / (A @ A @ vector(1, 1)).norm()
    w = (vector(1, 1) + eps).requires_grad_()
    (of_the_norm,) = torch.autograd.grad((A @ w).norm(), w)
    found = on_quadratic(lambda b: steppe.GAM(b, 0.5, alpha=0.3), lr=1.0)[0]
    torch.testing.assert_close(1 - found, vector(3, 4) + 0.3 * 0.5 * of_the_norm)


def test_le_sams_budget_falls_with_a_schedule() -> None:
    budget = steppe.schedule.Linear(1.0, 0.0, 2)
    model = Quadratic((1.0, 1.0))
    opt, lengths = steppe.LESAM(sgd(model, lr=0.0), 0.5, sigma=budget), []
    for _ in range(3):
        opt.step(model.batch(A[None], torch.zeros(1, 2)))
        lengths.append(float(opt.telemetry.eps_norm))
    assert lengths == pytest.approx([0.2, 0.1, 0.0])


def test_le_sams_budget_may_follow_the_learning_rate_and_errors_name_it() -> None:
    model = Quadratic((1.0, 1.0))
    opt = steppe.LESAM(sgd(model, lr=0.1), 0.5, sigma=steppe.schedule.ProportionalToLR(1.0, 0.0, 0.2, 0.0))
    opt.step(model.batch(A[None], torch.zeros(1, 2)))
    assert float(opt.telemetry.eps_norm) == pytest.approx(0.1)  # sigma is 0.5, norm(g) is 5
    with pytest.raises(ValueError, match="sigma must be"):
        steppe.LESAM(sgd(model), sigma=lambda step, group: -1.0).step(model.batch(A[None], torch.zeros(1, 2)))


def test_lookbehind_jumps_by_alpha_k_where_the_radius_is_0() -> None:
    for rho, factor in ((0.0, 1.0), (1e-9, 2.0)):
        (w,) = on_quadratic(lambda b, rho=rho: steppe.LookbehindSAM(b, rho, k=4, alpha=0.5), lr=1.0)
        torch.testing.assert_close(1 - w, factor * vector(3, 4), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: steppe.ReweightedSharpness(b, size=4, lam=0.5), "size and lam exclude"),
        (lambda b: steppe.XSAM(b, alpha=1.0, every=3), "alpha and every exclude"),
    ],
)
def test_arguments_of_which_one_would_be_dropped_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(sgd(world()))
    assert steppe.ReweightedSharpness(sgd(world())).rule.weights.size == 64
    assert steppe.XSAM(sgd(world())).rule.combine.every == 400


def test_xsams_telemetry_at_a_search_is_that_of_the_step() -> None:
    ours, theirs = world(), world()
    a, b = steppe.XSAM(sgd(ours), 0.1, every=1), steppe.SAM(sgd(theirs), 0.1)
    a.step(ours.batch)
    b.step(theirs.batch)
    assert a.telemetry.forwards == 23
    for name in ("eps_norm", "loss_adv", "gap", "g_adv_norm"):
        torch.testing.assert_close(getattr(a.telemetry, name), getattr(b.telemetry, name))


def test_micro_batches_of_eigen_sam_agree_on_the_sign_of_the_eigenvector() -> None:
    w = world()
    batch = steppe.Batch.supervised(w.model, w.criterion, w.x.repeat(4, 1), w.y.repeat(4))  # micro-batches are equal
    signs, seen = [], []

    class Spying(steppe.Eigen):
        def search(self, f: Oracle, v: steppe.Vector) -> steppe.Vector:
            turned = v * (-1.0 if len(signs) % 2 else 1.0)  # where the power iteration begins is arbitrary
            signs.append(1)
            return super().search(f, turned)

        def __call__(self, f: Oracle, d: steppe.Vector) -> steppe.Vector:
            seen.append(super().__call__(f, d))
            return seen[-1]

    opt = SharpnessAware(sgd(w, lr=0.01), steppe.Micro(N, steppe.Rule(geometry=Spying(every=100, power=40))), 0.1)
    opt.step(batch)
    kept = torch.cat([opt.state[p]["sharpness.eigenvector"].flatten() for p in w.parameters()])
    assert len(signs) == 4
    torch.testing.assert_close(kept.norm(), torch.ones_like(kept.norm()))
    for p in w.parameters():  # a mean of vectors that differ is shorter: it is used at length 1
        opt.state[p]["sharpness.eigenvector"] *= 0.3
    first = opt.telemetry.eps_norm
    opt.step(batch)
    torch.testing.assert_close(opt.telemetry.eps_norm, first, rtol=1e-2, atol=0)


def test_centralised_and_filtered_gradients_of_a_matrix() -> None:
    d = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, -9.0]])
    v = steppe.Vector([d, torch.tensor([5.0])])
    rows = steppe.Centralised(of=lambda f: v)(None).materialised()
    torch.testing.assert_close(rows[0], torch.tensor([[-2.0, -1.0, 3.0], [3.0, 3.0, -6.0]]))
    assert rows[1] == 5.0
    z = ((d - d.mean()) / d.std()).abs()
    assert torch.equal(steppe.Filtered(0.0, of=lambda f: v)(None).materialised()[0], d)  # none is left out
    for q in (0.5, 0.7, 0.95):
        filtered = steppe.Filtered(q, of=lambda f: v)(None).materialised()
        assert torch.equal(filtered[0], torch.where(z > z.quantile(q), d, 0.0))
        assert filtered[1] == 5.0
    even = steppe.Filtered(0.5, of=lambda f: steppe.Vector([torch.ones(2, 2)]))(None).materialised()
    assert torch.equal(even[0], torch.ones(2, 2))  # none stands out: all stay


# ------------------------------------------------------------------------------------------------- RW-SAM's sharpness


def test_reweighted_sharpness_on_four_examples() -> None:
    """u = g + (sum p_i A_i) eps with the weights of ``test_golden`` at lam 0.5."""
    p = vector(0.149643316, 0.467925697, 0.181424026, 0.201006962)
    g_i = torch.tensor([(3.0, 4), (2, 7), (2, 5), (5.5, 1)], dtype=torch.float64)
    d = p @ g_i
    expected = g_i.mean(0) + torch.einsum("n,nij->ij", p, torch.tensor(A4, dtype=torch.float64)) @ (0.5 * d / d.norm())
    model = Quadratic((1.0, 1.0))
    SharpnessAware(sgd(model, lr=1.0), steppe.BothWeighted(steppe.Softmax(0.5, ExactNorms())), 0.5).step(
        model.batch(A4, B4)
    )
    torch.testing.assert_close(1 - model.weight.detach(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.5, 8, 63.5])
def test_the_temperature_gives_the_effective_number_of_examples(size: float, dtype: torch.dtype) -> None:
    norms = torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=dtype).exp()
    p = steppe.EffectiveSize(size).weights(norms)
    torch.testing.assert_close(1 / p.square().sum(-1), torch.full((5,), size, dtype=dtype), rtol=1e-4, atol=0)
    torch.testing.assert_close(p, steppe.EffectiveSize(size).weights(1000 * norms), rtol=1e-3, atol=1e-6)
    assert (p.argsort(-1) == norms.argsort(-1)).all()


def test_weights_of_small_batches_and_of_equal_norms() -> None:
    for norms in (torch.rand(6), torch.full((80,), 3.0), torch.zeros(80)):
        p = steppe.EffectiveSize(64 if len(norms) == 6 else 8).weights(norms)
        torch.testing.assert_close(p, torch.full_like(p, 1 / len(p)))
    two = steppe.EffectiveSize(1.0).weights(torch.tensor([1.0, 4.0, 4.0]))
    torch.testing.assert_close(two, torch.tensor([0.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="size must be a number >= 1"):
        steppe.EffectiveSize(0.5)


def test_uniform_weights_on_both_gradients_are_sam() -> None:
    ours, theirs = world(), world()
    a, b = steppe.ReweightedSharpness(sgdm(ours), 0.3, size=N), steppe.SAM(sgdm(theirs), 0.3)
    for x, y in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(x)
        b.step(y)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- what is asked


def oracle(model: nn.Module, batch: steppe.Batch, **options) -> Oracle:
    parameters = list(model.parameters())
    return Oracle(batch, Parameters(parameters, Radii([0.1] * len(parameters))), **options)


def test_functional_sam_is_the_jacobian_at_one_point_and_the_loss_at_another() -> None:
    w = world()
    opt = steppe.FunctionalSAM(sgd(w, lr=1.0), 0.3)
    before, names = w.weights(), [name for name, _ in w.model.named_parameters()]
    y = w.model(w.x)
    (v,) = torch.autograd.grad(w.criterion(y, w.y).mean(), y)
    g = torch.autograd.grad(w.criterion(w.model(w.x), w.y).mean(), w.parameters())
    norm = torch.cat([t.flatten() for t in g]).norm()
    away = {n: p + 0.3 * t / norm for n, p, t in zip(names, before, g, strict=True)}
    outputs = lambda tensors: torch.func.functional_call(w.model, tensors, (w.x,))  # noqa: E731
    expected = torch.func.vjp(outputs, away)[1](v)[0]
    loss_adv = w.criterion(outputs(away), w.y).mean()
    opt.step(w.batch)
    for n, p, q in zip(names, before, w.parameters(), strict=True):
        torch.testing.assert_close(p - q, expected[n], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(opt.telemetry.loss_adv, loss_adv.detach())
    assert (opt.telemetry.forwards, opt.telemetry.backwards) == (2, 2)


def test_pulled_back_at_w_the_gradient_at_the_outputs_is_g() -> None:
    w = world()
    for batch in (w.batch, steppe.Batches([w.batch.subset(torch.arange(4)), w.batch.subset(torch.arange(4, 10))])):
        f = oracle(w.model, batch)
        v = f.output_gradient()
        assert sum(map(len, v)) == N
        for a, b in zip(f.g.materialised(), f.pull_back(v).materialised(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_functional_sam_needs_a_loss_in_two_parts_and_one_output() -> None:
    w = world()
    loss = lambda model, d: w.criterion(model(d[0]), d[1])  # noqa: E731
    before = w.weights()
    with pytest.raises(TypeError, match=r"Batch\.supervised\(model, criterion"):
        steppe.FunctionalSAM(sgd(w)).step(steppe.Batch(w.model, loss, (w.x, w.y)))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = w.model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.of(x), x

    pair = steppe.Batch.supervised(Pair(), lambda y, t: w.criterion(y[0], t), w.x, w.y)
    with pytest.raises(TypeError, match="output is one tensor, got tuple"):
        steppe.FunctionalSAM(sgd(w)).step(pair)
    assert all(torch.equal(p, q) for p, q in zip(before, w.parameters(), strict=True))


@pytest.mark.parametrize("named", [True, False])
def test_functional_sam_refuses_a_criterion_that_is_trained(named: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            return nn.functional.cross_entropy(y * self.scale, t, reduction="none")

    w, criterion = world(), Scaled()
    both = [*w.model.named_parameters(), ("scale", criterion.scale)]
    opt = steppe.FunctionalSAM(sgd(both if named else [p for _, p in both]))
    before, runs = w.weights(), []
    w.model.register_forward_hook(lambda *_: runs.append(1))
    name = "'scale' " if named else ""
    for run, given in enumerate([criterion, lambda y, t: criterion(y, t)]):
        batch = steppe.Batch.supervised(w.model, given, w.x, w.y)
        who = r"<function .*" if run else "Scaled"
        with pytest.raises(
            TypeError, match=rf"criterion must use no parameter .* got {who} with the parameter {name}of"
        ):
            opt.step(batch)
        assert len(runs) == run  # a module is refused before any pass
        assert all(torch.equal(p, q) for p, q in zip(before, w.parameters(), strict=True))
        steppe.FunctionalSAM(sgd(w, lr=0.0)).step(batch)  # its parameters are not trained
        runs.clear()


def test_a_function_with_trained_parameters_is_refused_before_anything_is_changed() -> None:
    torch.manual_seed(0)
    scale = nn.Parameter(torch.ones(3))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    criterion = lambda out, t: nn.functional.cross_entropy(out * scale, t, reduction="none")  # noqa: E731
    both = [steppe.Batch.supervised(model, criterion, x[i : i + 3], y[i : i + 3]) for i in (0, 3)]
    before, random = [t.clone() for t in model.state_dict().values()], torch.get_rng_state()
    for options, batch in (({}, both[0]), ({"m": 2}, both[0]), ({"m": 2, "sampled": 1}, both)):
        with pytest.raises(TypeError, match="criterion must use no parameter"):
            steppe.FunctionalSAM(torch.optim.SGD([*model.parameters(), scale]), **options).step(batch)
        assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
        assert torch.equal(random, torch.get_rng_state())
    opt = steppe.FunctionalSAM(torch.optim.SGD(model.parameters()), 0.1)  # where it is not trained
    for k in (1, 2):
        opt.step(both[0])
        assert (opt.telemetry.passes, int(model[1].num_batches_tracked)) == (2, k)


def test_functional_sam_refuses_a_loss_that_only_has_a_criterion() -> None:
    w = world()

    class Penalised:
        criterion = w.criterion

        def __call__(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
            return w.criterion(model(data[0]), data[1]) + sum(p.square().sum() for p in model.parameters())

    with pytest.raises(TypeError, match=r"Batch\.supervised\(model, criterion"):
        steppe.FunctionalSAM(sgd(w)).step(steppe.Batch(w.model, Penalised(), (w.x, w.y)))


def test_hessian_vector_products_are_exact_on_quadratics() -> None:
    H = torch.tensor(A4, dtype=torch.float64).mean(0)
    for w0, v in (((1.0, 1.0), (1.0, -2.0)), ((30.0, -7.0), (0.0, 1e-3))):
        model = Quadratic(w0)
        f = oracle(model, model.batch(A4, B4))
        found = f.hvp(steppe.Vector([vector(*v)])).materialised()[0]
        torch.testing.assert_close(found, H @ vector(*v), rtol=1e-7, atol=0)
        assert torch.equal(model.weight.detach(), vector(*w0))


def test_hessian_vector_products_of_a_net_see_the_same_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    w = world()
    batch = steppe.Batch.supervised(model, w.criterion, w.x, w.y)
    f = oracle(model, batch)
    random = torch.get_rng_state()
    f.g  # noqa: B018
    statistics = [b.clone() for b in model.buffers()]
    v = [torch.randn_like(p) for p in model.parameters()]
    found = f.hvp(steppe.Vector(v)).materialised()
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.buffers(), strict=True))
    torch.set_rng_state(random)
    g = torch.autograd.grad(batch.losses().mean(), list(model.parameters()), create_graph=True)
    expected = torch.autograd.grad(g, list(model.parameters()), v)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    low = oracle(model.bfloat16(), batch)
    with pytest.raises(TypeError, match="hvp needs parameters in float32"):
        low.hvp(low.w)


def test_the_bases_state_by_parameter() -> None:
    w, seen = world(), []

    def rule(f: Oracle) -> Update:
        seen.append(f.base_state("exp_avg").tensors)
        return Update(f.g)

    rule.declares = Declaration(g_adv=False, base_state=frozenset({"exp_avg", "step"}))
    unused = nn.Parameter(torch.ones(2))
    opt = SharpnessAware(torch.optim.Adam([*w.parameters(), unused]), rule, 0.1)
    opt.step(w.batch)
    assert seen[-1] == [None] * (len(w.parameters()) + 1)
    opt.step(w.batch)
    assert all(t is not None for t in seen[-1][:-1])
    assert seen[-1][-1] is None
    kept = [opt.state[p]["exp_avg"] for p in w.parameters()]
    opt.step(w.batch)
    assert all(a is b for a, b in zip(seen[-1], kept, strict=False))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("exp_avg_sq", ValueError, "declares as base_state"),
        ("step", TypeError, r"of the parameter's shape \(6, 5\), got"),
    ],
)
def test_state_that_is_not_declared_or_no_vector_is_refused(name: str, error: type, message: str) -> None:
    def rule(f: Oracle) -> Update:
        return Update(f.g + (f.base_state(name) if f.step else 0.0 * f.g))

    rule.declares = Declaration(g_adv=False, base_state=frozenset({"step"}))
    w = world()
    opt = SharpnessAware(torch.optim.Adam(w.parameters()), rule, 0.1)
    opt.step(w.batch)
    before = w.weights()
    with pytest.raises(error, match=message):
        opt.step(w.batch)
    assert all(torch.equal(p, q) for p, q in zip(before, w.parameters(), strict=True))


@pytest.mark.parametrize("method", [steppe.MomentumSAM, steppe.PreconditionedSAM])
def test_a_base_without_the_state_that_is_read_is_refused(method: type[SharpnessAware]) -> None:
    w = world()
    with pytest.raises(TypeError, match=r"needs a base optimizer that keeps .* got SGD that does not"):
        method(sgd(w))
    with pytest.raises(TypeError, match="got SGD that"):
        method([sgd(w.parameters()[:1]), sgd(w.parameters()[1:])])

    class Unknown(torch.optim.SGD):
        pass

    opt, runs = method(Unknown(w.parameters(), lr=0.1)), []  # known by its first step
    opt.step(w.batch)
    w.model.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(TypeError, match=r"needs a base optimizer that keeps .* got Unknown that does not"):
        opt.step(w.batch)
    assert not runs  # before any pass


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW", "NAdam", *KEPT])
def test_what_torchs_optimizers_keep(name: str) -> None:
    kind: type[torch.optim.Optimizer] = getattr(torch.optim, name)
    read = {"momentum_buffer", "exp_avg", "exp_avg_sq", "square_avg"}
    p = nn.Parameter(torch.ones(2, 2))
    base = kind([p], lr=0.1, **({"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}))
    p.grad = torch.ones(2, 2)
    base.step()
    kept = read & base.state[p].keys()
    assert kept == KEPT.get(name, kept)
    for names in ({"momentum_buffer", "exp_avg"}, {"exp_avg_sq", "square_avg"}):
        refused = False
        try:
            check_state(base, frozenset(names))
        except TypeError:
            refused = True
        assert refused == (not kept & names)


@pytest.mark.parametrize(
    ("method", "first", "message"),
    [
        (steppe.MomentumSAM, lambda p: sgd(p), "reads exp_avg or momentum_buffer .* which SGD does not keep for 2 of"),
        (
            steppe.PreconditionedSAM,
            lambda p: torch.optim.Muon([t for t in p if t.dim() == 2]),
            "reads exp_avg_sq or square_avg .* which Muon does not keep for 1 of",
        ),
    ],
)
def test_state_that_one_of_several_bases_lacks_is_told_once(method, first, message: str) -> None:
    w = world()
    muon = first(w.parameters()[:2])
    has = {id(p) for group in muon.param_groups for p in group["params"]}
    opt = method([muon, torch.optim.AdamW([p for p in w.parameters() if id(p) not in has])], 0.1)
    with pytest.warns(UserWarning, match=message):
        opt.step(w.batch)
    opt.step(w.batch)  # warnings are errors here
    assert opt.telemetry.eps_norm > 0
    still = world()
    groups = [{"params": still.parameters()[:2], "rho": 0.0}, {"params": still.parameters()[2:]}]
    opt = method([sgd(groups[:1]), torch.optim.AdamW(groups[1:])], 0.1)
    opt.step(still.batch)  # it is meant
    opt.step(still.batch)


def test_entries_whose_second_moment_is_0_take_no_part() -> None:
    model = Quadratic((1.0, 1.0))
    base = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 0.5))
    opt = steppe.PreconditionedSAM(base, 0.5)
    first, both = torch.diag(vector(3, 0)), A
    opt.step(model.batch(first[None], torch.zeros(1, 2)))
    assert (base.state[model.weight]["exp_avg_sq"] > 0).tolist() == [True, False]
    opt.step(model.batch(both[None], torch.zeros(1, 2)))
    torch.testing.assert_close(model.weight.grad, vector(3 * 1.5, 4))  # eps is (0.5, 0)


def test_preconditioned_sam_reads_the_moments_of_a_base_that_is_trained() -> None:
    model = Quadratic((1.0, 1.0))
    base = torch.optim.Adam(model.parameters(), lr=0.0)
    model.batch(A[None], torch.zeros(1, 2))()
    base.step()
    steppe.PreconditionedSAM(base, 0.5).step(model.batch(A[None], torch.zeros(1, 2)))
    torch.testing.assert_close(model.weight.grad, vector(3, 4) * (1 + 0.5 / 2**0.5))  # M^-1 g is (1, 1) times a number


def test_momentum_sam_perturbs_by_the_joint_momentum_of_several_bases() -> None:
    w = world()
    a, b = torch.optim.Adam(w.parameters()[:2]), sgdm(w.parameters()[2:])
    opt = steppe.MomentumSAM([a, b], 0.3)
    opt.step(w.batch)
    assert opt.telemetry.eps_norm == 0
    opt.step(w.batch)
    torch.testing.assert_close(opt.telemetry.eps_norm, torch.tensor(0.3, dtype=torch.float64))
    assert (opt.telemetry.forwards, opt.telemetry.backwards) == (1, 1)


def test_running_statistics_see_the_one_pass_of_momentum_sam() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    w = world(torch.float32)
    opt = steppe.MomentumSAM(sgdm(model), 0.3, cosine=True)
    for k in range(1, 4):
        opt.step(steppe.Batch.supervised(model, w.criterion, w.x, w.y))
        assert model[1].num_batches_tracked == k


def test_numbers_are_remembered_in_every_group_and_only_where_declared() -> None:
    w = world()
    groups = [{"params": w.parameters()[:2]}, {"params": w.parameters()[2:], "rho": 0.0}]
    opt = steppe.AESAM(sgd(groups), 0.1)
    opt.step(w.batch)
    square = float(opt.telemetry.g_norm) ** 2
    assert [g["sharpness.mu"] for g in opt.param_groups] == pytest.approx([square] * 2)
    with pytest.raises(ValueError, match="declares as numbers"):
        SharpnessAware(sgd(w), lambda f: Update(f.recall_number("mu", 0.0) * f.g)).step(w.batch)


def test_ae_sam_takes_one_pass_where_the_gradient_is_small() -> None:
    model = Quadratic((1.0, 1.0))
    opt, batch = steppe.AESAM(sgd(model, lr=0.1), 0.05), model.batch(A[None], torch.zeros(1, 2))
    passes = []
    for k in range(4):
        if k == 3:
            with torch.no_grad():
                model.weight.copy_(vector(9.0, 9.0))
        opt.step(batch)
        passes.append(opt.telemetry.forwards)
    assert passes == [2, 1, 1, 2]  # the first is its own mean; then the gradient falls


def test_keeping_bases_step_as_they_do() -> None:
    a, b = world(), world()
    ours, plain = KeepingSGD(a.parameters(), lr=0.1), sgd(b, lr=0.1)
    for opt, w in ((ours, a), (plain, b)):
        w.batch()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
