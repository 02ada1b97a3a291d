"""Micro-batches in two passes over the whole batch equal the serial loop, or refuse."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steppe
from steppe import Coupled, Euclidean, Exact, Micro, Reweighted, Rule, SharpnessAware, Unnormalised, Weighted
from steppe.engine.parameters import Parameters, Radii
from steppe.factored import gradient_statistics, plans, register_factored
from steppe.factored.collect import TWO_PASSES
from steppe.factored.engine import SharedPasses
from steppe.factored.layers import LAYERS
from steppe.factored.passes import FirstPass
from tests.cases import assert_close, flat, sgdm
from tests.factored_models import EXAMPLES, Example, hold

N = 12
MS = [1, 2, 5, 8, N // 2, N]


def ends(example: Example, make, dtype=torch.float64, steps: int = 2, prepare=lambda model: None):
    """Weights after some steps, in parallel and serially."""
    found = []
    for parallel in (True, False):
        model = example.model(dtype)
        prepare(model)
        opt = make(model, parallel)
        for k in range(steps):
            opt.step(example.batch(model, N, dtype, seed=k))
        found.append((flat(model), opt))
    return found


def assert_equal(found, tolerance: float, numbers=("loss", "loss_adv", "g_norm", "eps_norm")) -> None:
    (ours, opt), (theirs, serial) = found
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    for name in numbers:
        a, b = (float(getattr(o.telemetry, name)) for o in (opt, serial))
        assert a == pytest.approx(b, rel=max(tolerance * 100, 1e-8)), name
    assert (opt.telemetry.forwards, opt.telemetry.backwards) == (2, 2)


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_equals_the_serial_loop(name: str, m: int) -> None:
    make = lambda model, parallel: steppe.SAM(sgdm(model), 0.3, m=m, parallel=parallel)  # noqa: E731
    assert_equal(ends(EXAMPLES[name], make), 1e-10)
    assert_equal(ends(EXAMPLES[name], make, torch.float32, steps=1), 1e-5)


METHODS = {
    "USAM": lambda b, m, p: steppe.USAM(b, 0.3, m=m, parallel=p),
    "UnifiedSAM": lambda b, m, p: steppe.UnifiedSAM(b, 0.3, 0.4, m=m, parallel=p),
    "WSAM": lambda b, m, p: steppe.WSAM(b, 0.3, 0.8, m=m, parallel=p),
    "CoupledWSAM": lambda b, m, p: steppe.CoupledWSAM(b, 0.3, 0.8, m=m, parallel=p),
}


@pytest.mark.parametrize("m", [1, 5, 6])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp", "vit", "gpt", "cnn"])
def test_other_methods_equal_the_serial_loop(name: str, method: str, m: int) -> None:
    assert_equal(ends(EXAMPLES[name], lambda model, p: METHODS[method](sgdm(model), m, p)), 1e-10)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_micro_batch_of_all_is_plain_sam(name: str) -> None:
    plain = lambda model, p: steppe.SAM(sgdm(model), 0.3, m=N if p else None, parallel=p)  # noqa: E731
    assert_equal(ends(EXAMPLES[name], plain), 1e-10)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("m", [1, 4, 5])
@pytest.mark.parametrize("name", EXAMPLES)
def test_both_sides_of_the_cost_rule_are_exact(name: str, m: int, whole: bool, monkeypatch) -> None:
    hold(whole, monkeypatch)
    make = lambda model, parallel: steppe.SAM(sgdm(model), 0.3, m=m, parallel=parallel)  # noqa: E731
    assert_equal(ends(EXAMPLES[name], make), 1e-10)


def test_the_cost_rule_prefers_factors_for_few_rows() -> None:
    assert not TWO_PASSES.whole(1, 256, 256)
    assert not TWO_PASSES.whole(8, 1024, 1024)
    assert TWO_PASSES.whole(1024, 256, 256)


@pytest.mark.parametrize("name", ["GSAM", "ASAM", "FisherSAM", "LookSAM", "FSAM", "VaSSO"])
def test_micro_batches_of_other_rules_run_in_a_loop(name: str) -> None:
    method = getattr(steppe, name)
    make = lambda model, p: method(sgdm(model), 0.3, m=5, parallel="auto" if p else False)  # noqa: E731
    (ours, _), (theirs, _) = ends(EXAMPLES["mlp"], make)
    assert torch.equal(ours, theirs)
    model = EXAMPLES["mlp"].model(torch.float64)
    with pytest.raises(ValueError, match="run in a loop"):
        method(sgdm(model), 0.3, m=5, parallel=True).step(EXAMPLES["mlp"].batch(model, N, torch.float64))


# ---- RW-SAM


def per_example_gradients(model: nn.Module, batch: steppe.Batch) -> torch.Tensor:
    """By autograd, one example at a time, flat: ``(n, d)``."""
    rows = []
    for part in batch.split(1):
        with torch.enable_grad():
            g = torch.autograd.grad(part.losses().sum(), list(model.parameters()), allow_unused=True)
        flat = [torch.zeros_like(p) if t is None else t for t, p in zip(g, model.parameters(), strict=True)]
        rows.append(torch.cat([t.flatten() for t in flat]))
    return torch.stack(rows)


@pytest.mark.parametrize("whole", [None, True, False])
@pytest.mark.parametrize("name", EXAMPLES)
def test_exact_norms_and_the_weighted_gradient(name: str, whole: bool | None, monkeypatch) -> None:
    hold(whole, monkeypatch)
    model = EXAMPLES[name].model(torch.float64)
    batch = EXAMPLES[name].batch(model, N, torch.float64)
    rows = per_example_gradients(model, batch)
    parameters = list(model.parameters())
    f = steppe.Oracle(batch, Parameters(parameters, Radii([1.0] * len(parameters))), shortcuts=SharedPasses(True))
    norms = Exact()(f)
    torch.testing.assert_close(norms, rows.norm(dim=1), rtol=1e-10, atol=0)
    d = Reweighted(2.0)(f)
    p = torch.softmax(2.0 * rows.norm(dim=1), 0)
    ours = [torch.zeros_like(q) if t is None else t for t, q in zip(d.tensors, parameters, strict=True)]
    torch.testing.assert_close(torch.cat([t.flatten() for t in ours]), p @ rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("m", [None, 1, 5, 6])
@pytest.mark.parametrize("combine", [steppe.Perturbed(), Weighted(0.8), Coupled(0.7)])
@pytest.mark.parametrize("name", ["mlp", "gpt", "resnet"])
def test_rw_sam_equals_exact_norms_by_hand(name: str, combine, m: int | None) -> None:
    def rule(parallel):
        sample = Reweighted(3.0) if parallel else Reweighted(3.0, ByHand())
        whole = Rule(sample, combine=combine)
        return whole if m is None else Micro(m, whole)

    make = lambda model, p: SharpnessAware(sgdm(model), rule(p), 0.3, parallel=p)  # noqa: E731
    (ours, _), (theirs, _) = ends(EXAMPLES[name], make)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("weights", [steppe.EffectiveSize, steppe.Softmax])
@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_on_both_gradients_are_those_by_hand_in_two_passes(name: str, weights) -> None:
    seen = []

    def make(model, parallel):
        rule = steppe.BothWeighted(weights(3.0) if parallel else weights(3.0, ByHand()))
        seen.append(SharpnessAware(sgdm(model), rule, 0.3, parallel=parallel))
        return seen[-1]

    (ours, _), (theirs, _) = ends(EXAMPLES[name], make)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert (seen[0].telemetry.forwards, seen[0].telemetry.backwards) == (2, 2)


class ByHand:
    per_example = True

    def __call__(self, f):
        model = f.batch().model
        return per_example_gradients(model, f.batch()).norm(dim=1)


def test_without_factors_the_probe_answers() -> None:
    example = EXAMPLES["mlp"]
    model = example.model(torch.float64)
    opt = steppe.RWSAM(sgdm(model), 0.3, parallel=False)
    opt.step(example.batch(model, N, torch.float64))
    assert opt.telemetry.forwards == 3
    opt = steppe.RWSAM(sgdm(model), 0.3)
    opt.step(example.batch(model, N, torch.float64))
    assert opt.telemetry.forwards == 2


# ---- statistics


@pytest.mark.parametrize("m", [1, 5, N])
@pytest.mark.parametrize("name", EXAMPLES)
def test_gradient_statistics(name: str, m: int) -> None:
    model = EXAMPLES[name].model(torch.float64)
    batch = EXAMPLES[name].batch(model, N, torch.float64)
    rows = per_example_gradients(model, batch)
    parts = torch.stack([part.mean(0) for part in rows.split(m)])
    shares = torch.tensor([len(part) / N for part in rows.split(m)], dtype=torch.float64)
    state = torch.get_rng_state()
    found = gradient_statistics(batch, m=m)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(found.norms, parts.norm(dim=1), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.g_norm, rows.mean(0).norm())
    trace = (shares * (parts - rows.mean(0)).square().sum(1)).sum()
    torch.testing.assert_close(found.trace, trace, rtol=1e-8, atol=1e-12)


def test_gradient_statistics_of_some_parameters_leave_the_rest() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    example = EXAMPLES["mlp"]
    batch = example.batch(model, N, torch.float64)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    found = gradient_statistics(batch, [model[0].weight])
    rows = per_example_gradients(model, batch)[:, :20]
    torch.testing.assert_close(found.norms, rows.norm(dim=1))
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    with pytest.raises(ValueError, match="m must be"):
        gradient_statistics(batch, m=0)


def test_telemetry_of_gradient_noise() -> None:
    example = EXAMPLES["mlp"]
    for method in (steppe.SAM, steppe.GSAM):
        model = example.model(torch.float64)
        batch = example.batch(model, N, torch.float64)
        rows = per_example_gradients(model, batch)
        opt = method(sgdm(model), 0.1, gradient_noise=True)
        with pytest.raises(TypeError, match=r"steppe\.Batch"):
            opt.step(batch.__call__)
        opt.step(batch)
        expected = (rows - rows.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(opt.telemetry.trace_V, expected)
        assert opt.telemetry.forwards == 2


# ---- what is perturbed


@pytest.mark.parametrize("name", EXAMPLES)
def test_frozen_parameters_and_a_rho_for_every_group(name: str) -> None:
    def prepare(model):
        for p in list(model.parameters())[::3]:
            p.requires_grad_(False)

    def make(model, parallel):
        parameters = list(model.parameters())
        groups = [
            {"params": parameters[0::2], "rho": 0.5},
            {"params": parameters[1::4], "rho": 0.0},
            {"params": parameters[3::4]},
        ]
        base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return steppe.WSAM(base, 0.2, 0.8, m=5, parallel=parallel)

    found = ends(EXAMPLES[name], make, prepare=prepare)
    assert_equal(found, 1e-10, ("loss", "loss_adv", "eps_norm"))  # g_norm is that of the perturbed parameters here


class Attention(nn.Module):
    """Cross attention, masks, weights that are returned, sequences first."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, bias=True)
        self.memory, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.memory(x).transpose(0, 1)  # (length, n, d)
        causal = torch.triu(torch.ones(4, 4, dtype=torch.bool), 1)
        padding = x[..., 0].mT > 0.3
        padding[:, 0] = False
        a, weights = self.attend(x, x, x, attn_mask=causal, key_padding_mask=padding)
        b, _ = self.attend(x, a, a.relu(), need_weights=False)
        return self.head((b + weights.mean((1, 2))[None, :, None])[0])


def test_multi_head_attention() -> None:
    example = Example(Attention, lambda n: (torch.randn(n, 4, 5), torch.randint(3, (n,))))
    model = example.model(torch.float64)
    batch = example.batch(model, N, torch.float64)
    expected = batch.losses()
    f = steppe.Oracle(batch, Parameters(list(model.parameters()), Radii([1.0] * 8)))
    plan = SharedPasses(True).entry(f, batch).plan
    assert not plan.reason
    with FirstPass(plan.tracked, LAYERS):
        torch.testing.assert_close(batch.losses(), expected)
    for m in (1, 5):
        assert_equal(ends(example, lambda model, p, m=m: steppe.SAM(sgdm(model), 0.3, m=m, parallel=p)), 1e-10)


def test_channels_last() -> None:
    prepare = lambda model: model.to(memory_format=torch.channels_last)  # noqa: E731
    for m in (1, 5):
        make = lambda model, p, m=m: steppe.SAM(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
        assert_equal(ends(EXAMPLES["resnet"], make, prepare=prepare), 1e-10)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit", "gpt"])
def test_autocast_bf16(name: str) -> None:
    example = EXAMPLES[name]

    def half(model, data):
        with torch.autocast("cpu", torch.bfloat16):
            return steppe_loss(model, data).float()

    from tests.factored_models import loss as steppe_loss

    updates = []
    for parallel in (True, False):
        model = example.model(torch.float32)
        before = flat(model)
        opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, m=4, parallel=parallel)
        opt.step(steppe.Batch(model, half, example.batch(model, N, torch.float32).data))
        updates.append(flat(model) - before)
    assert torch.cosine_similarity(*updates, dim=0) > 0.99


# ---- what is refused


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)


class Contrast(Mixed):
    """Scales by the mean of the batch, which needs no gradient."""

    def forward(self, x):
        return self.net[0](x)[:, :3] * (1 + x.mean())


class Own(nn.Module):
    """A parameter whose value is read as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.slope = nn.Linear(5, 3), nn.Parameter(torch.tensor([0.3]))

    def forward(self, x):
        return self.net(x) * self.slope.item()


vectors = lambda n: (torch.randn(n, 5), torch.randint(3, (n,)))  # noqa: E731


@pytest.mark.parametrize(
    ("model", "why"), [(Contrast, "depends on the other examples"), (Own, r"slope is used by item")]
)
def test_what_does_not_factor_runs_serially_and_says_why(model, why: str, caplog) -> None:
    example = Example(model, vectors)
    make = lambda m, p: steppe.SAM(sgdm(m), 0.3, m=5, parallel="auto" if p else False)  # noqa: E731
    with caplog.at_level(logging.INFO, "steppe"), pytest.warns(UserWarning, match=why) as shown:
        (ours, _), (theirs, _) = ends(example, make, steps=3)
    assert len(shown) == 1
    assert "sampled=1" in str(shown[0].message)
    assert torch.equal(ours, theirs)
    assert len(caplog.records) == 1  # one line, once a model
    import re

    assert re.search(why, caplog.records[0].message)
    if model is not Contrast:
        trained = example.model(torch.float64)
        before = [p.detach().clone() for p in trained.parameters()]
        with pytest.raises(ValueError, match=why):
            steppe.SAM(sgdm(trained), 0.3, m=5, parallel=True).step(example.batch(trained, N, torch.float64))
        assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_registered_modules_factor() -> None:
    class Slope(nn.PReLU):
        pass

    class Registered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.slope, self.b = nn.Linear(5, 4), Slope(4), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(self.slope(self.slope(self.a(x)) + 0.1))

    example = Example(Registered, vectors)
    model = example.model(torch.float64)
    register_factored(Slope)
    for m in (1, 5, N):
        for method in (steppe.SAM, steppe.WSAM, steppe.RWSAM):
            make = lambda model, p, m=m, method=method: method(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
            (ours, _), (theirs, _) = ends(example, make)
            if method is not steppe.RWSAM:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert "forward" not in vars(model.slope)
    with pytest.raises(TypeError, match="module_type"):
        register_factored(lambda x: x)


def test_plain_sam_on_a_batch_is_plain_sam() -> None:
    """Nothing is rehearsed, and no factors are held: two ordinary passes, the second away from ``w``."""
    example = EXAMPLES["mlp"]
    model = example.model(torch.float64)
    home, stayed = model[0].weight.detach().clone(), []
    model[0].register_forward_hook(lambda module, *_: stayed.append(torch.equal(module.weight, home)))
    steppe.SAM(sgdm(model), 0.3).step(example.batch(model, N, torch.float64))
    assert stayed == [True, False]
    assert model not in plans._known


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: _InPlaceCompiled(m)])
def test_compiled_models_run_serially(wrap, caplog) -> None:
    example = EXAMPLES["mlp"]
    model = example.model(torch.float64)
    wrapped = wrap(model)
    batch = example.batch(model, N, torch.float64)
    with caplog.at_level(logging.INFO, "steppe"):
        steppe.SAM(sgdm(model), 0.3, m=5).step(steppe.Batch(wrapped, batch.loss, batch.data))
    assert "compiled" in caplog.text


def _InPlaceCompiled(model):
    model.compile(backend="eager")
    return model


def test_a_model_that_changes_its_mind_falls_back() -> None:
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.use_b = nn.Linear(5, 3), nn.Linear(5, 3), False

        def forward(self, x):
            return self.a(x) + (self.b(x) if self.use_b else 0)

    example = Example(Fickle, vectors)
    found = []
    for parallel in ("auto", False):
        model = example.model(torch.float64)
        opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, m=5, parallel=parallel)
        for k in range(4):
            model.use_b = k >= 2
            opt.step(example.batch(model, N, torch.float64, seed=k))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_an_error_of_the_model_is_the_users_to_see() -> None:
    model = nn.Linear(5, 3)
    batch = steppe.Batch(model, lambda m, d: m(d).square().sum(1) / 0 * missing, torch.randn(N, 5))  # noqa: F821
    with pytest.raises(NameError, match="missing"):
        steppe.SAM(sgdm(model), m=4).step(batch)


def test_new_shapes_are_rehearsed_and_modes_kept_apart() -> None:
    example = EXAMPLES["mlp"]
    model = example.model(torch.float64)
    twin = copy.deepcopy(model)
    for m, parallel in ((model, True), (twin, False)):
        opt = steppe.SAM(sgdm(m), 0.3, m=4, parallel=parallel)
        for n in (12, 7, 3, 12):
            opt.step(example.batch(m, n, torch.float64, seed=n))
    assert_close(model, twin, atol=1e-10)


def test_geometry_pieces_agree_with_their_radial_form() -> None:
    v = steppe.Vector([torch.tensor([3.0, 4.0])])
    for geometry in (Euclidean(), Unnormalised(), steppe.Unified(0.3)):
        torch.testing.assert_close(geometry(None, v).materialised()[0], geometry.radial(v.norm()) * v.tensors[0])


# ---- what must not be wrong in silence


class Normed(nn.Module):
    """Mixes examples in a way that no gradient passes through, or only once it is not zero."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        if how == "zero head":
            nn.init.zeros_(self.b.weight)

    def forward(self, x):
        if self.how == "standardised input":
            x = (x - x.mean(0)) / x.std(0)
        if self.how == "mixup":
            x = 0.7 * x + 0.3 * x.flip(0)
        h = self.a(x)
        if self.how == "detached mean":
            h = h - h.mean(0).detach()
        if self.how == "zero head":
            h = h - h.mean(0)
        return self.b(torch.tanh(h))


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
@pytest.mark.parametrize("how", ["standardised input", "mixup", "detached mean", "zero head"])
def test_hidden_mixing_is_found(how: str) -> None:
    make = lambda m, p: steppe.SAM(sgdm(m), 0.3, m=4, parallel="auto" if p else False)  # noqa: E731
    (ours, _), (theirs, _) = ends(Example(lambda: Normed(how), vectors), make, steps=3)
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
@pytest.mark.parametrize("how", ["position", "detached weights", "advantage"])
def test_losses_that_look_at_the_batch_are_found(how: str) -> None:
    def loss(model, data):
        ce = F.cross_entropy(model(data[0]), data[1], reduction="none")
        if how == "position":
            return ce * (1 + torch.arange(len(ce)))
        if how == "detached weights":
            return ce * torch.softmax(ce.detach(), 0) * len(ce)
        return (ce - ce.mean()) / ce.std()

    found = []
    for parallel in ("auto", False):
        model = EXAMPLES["mlp"].model(torch.float64)
        opt = steppe.SAM(sgdm(model), 0.3, m=4, parallel=parallel)
        for k in range(3):
            opt.step(steppe.Batch(model, loss, EXAMPLES["mlp"].batch(model, N, torch.float64, seed=k).data))
        found.append(flat(model))
    assert torch.equal(*found)


def test_zero_initialised_heads_and_positions_that_divide() -> None:
    """T a multiple of n, so that positions could be taken for examples; a head of zeros, so that nothing shows it."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.head = nn.Embedding(7, 6), nn.Embedding(N, 6), nn.Linear(6, 7)
            nn.init.zeros_(self.head.weight)

        def forward(self, index):
            return self.head(torch.tanh(self.tokens(index) + self.positions(torch.arange(N))))

    example = Example(Positions, lambda n: (torch.randint(7, (n, N)), torch.randint(7, (n, N))))
    for m in (1, 5):
        make = lambda model, p, m=m: steppe.SAM(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
        assert_equal(ends(example, make, steps=3), 1e-9)


def test_examples_that_cancel_keep_their_norm_in_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64).repeat_interleave(2, 0)
    noise = torch.randn(8, 64)
    updates = {}
    for dtype, parallel in ((torch.float32, True), (torch.float64, False)):
        model = nn.Linear(64, 64, bias=False)
        torch.manual_seed(1)
        nn.init.normal_(model.weight, std=0.1)
        model = model.to(dtype)
        with torch.no_grad():
            sign = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
            y = (x.double() @ model.weight.double().T + sign * torch.ones(64) + 1e-4 * noise).to(dtype)
        before = model.weight.detach().clone()
        opt = steppe.USAM(torch.optim.SGD(model.parameters(), lr=1.0), 0.0, m=2, parallel=parallel)
        opt.param_groups[0]["rho"] = 0.5
        opt._stepper.rule = Micro(2, Rule())
        opt.step(steppe.Batch(model, lambda m, d: (m(d[0]) - d[1]).square().mean(1), (x.to(dtype), y)))
        assert float(opt.telemetry.eps_norm) == pytest.approx(0.5, rel=1e-3)
        updates[dtype] = (model.weight.detach() - before).double()
    error = (updates[torch.float32] - updates[torch.float64]).norm() / updates[torch.float64].norm()
    assert error < 0.05


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
def test_new_branches_hooks_and_packed_rows_fall_back() -> None:
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.slope, self.step = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(1)), 0

        def forward(self, x):
            h = self.a(x)
            h = F.prelu(h, self.slope) if self.step >= 2 else torch.tanh(h) * self.slope
            return self.b(h)

    found = []
    for parallel in ("auto", False):
        model = Example(Late, vectors).model(torch.float64)
        opt = steppe.SAM(sgdm(model), 0.3, m=4, parallel=parallel)
        for k in range(6):
            model.step = k
            if k == 4:
                model.a.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
            opt.step(Example(Late, vectors).batch(model, N, torch.float64, seed=k))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:micro-batches of m=. run in a loop")
def test_a_refused_model_draws_the_same_numbers() -> None:
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.slope = nn.Linear(5, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.b(F.dropout(self.a(x)) * self.slope.item())

    make = lambda m, p: steppe.SAM(sgdm(m), 0.3, m=4, parallel="auto" if p else False)  # noqa: E731
    (ours, _), (theirs, _) = ends(Example(Dropped, vectors), make, steps=3)
    assert torch.equal(ours, theirs)


def test_dropout_does_not_keep_a_model_from_factoring() -> None:
    net = lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3))  # noqa: E731
    model = Example(net, vectors).model(torch.float64)
    opt = steppe.SAM(sgdm(model), 0.3, m=4, parallel=True)
    opt.step(Example(net, vectors).batch(model, N, torch.float64))
    assert opt.telemetry.eps_norm == pytest.approx(0.3)


def test_a_batch_that_is_not_finite_gives_no_verdict() -> None:
    model = EXAMPLES["mlp"].model(torch.float64)
    batch = EXAMPLES["mlp"].batch(model, N, torch.float64)
    bad = steppe.Batch(model, batch.loss, (batch.data[0] * torch.inf, batch.data[1]))
    opt = steppe.SAM(sgdm(model), 0.3, m=4)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(bad)
    opt.step(batch)
    assert opt.telemetry.forwards == 2
    assert SharedPasses(True).entry(opt._stepper.oracle(batch), batch).plan.reason == ""


def test_gradient_statistics_refuse_mixed_examples() -> None:
    model = Example(Mixed, vectors).model(torch.float64)
    with pytest.raises(ValueError, match="batch normalisation"):
        gradient_statistics(Example(Mixed, vectors).batch(model, N, torch.float64))

    def contrast(model, data):
        z = model(data[0])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    model = EXAMPLES["mlp"].model(torch.float64)
    batch = EXAMPLES["mlp"].batch(model, N, torch.float64)
    with pytest.raises(ValueError, match="influence one another"):
        gradient_statistics(steppe.Batch(model, contrast, batch.data))
