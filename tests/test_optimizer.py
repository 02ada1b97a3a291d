"""The shell is a torch optimizer like any other, and refuses bad arguments before it changes anything."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import steppe
from steppe import Rule, SharpnessAware
from tests.cases import METHODS, World, assert_close, named, optimizer, same_bits, sgd, sgdm, world


def test_it_is_an_optimizer() -> None:
    w = world()
    base = sgdm(w)
    opt = steppe.SAM(base)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults is base.defaults
    w.batch()
    opt.zero_grad()
    assert all(p.grad is None for p in w.parameters())
    assert repr(opt).startswith("SAM(rule=Rule(sample=Mean(), geometry=Euclidean(), ")
    assert "SGD" in repr(opt)


SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("on_base", [False, True], ids=["on the wrapper", "on the base"])
def test_schedulers_work_without_warnings(name: str, on_base: bool) -> None:
    ours, theirs = world(), world()
    base, plain = sgdm(ours), sgdm(theirs)
    opt = steppe.SAM(base)
    scheduler, expected = SCHEDULERS[name](base if on_base else opt), SCHEDULERS[name](plain)
    for a, b in zip(ours.batches(5), theirs.batches(5), strict=True):
        opt.step(a)
        plain.step(b)
        scheduler.step()
        expected.step()
        for key in ("lr", "momentum"):
            assert opt.param_groups[0][key] == plain.param_groups[0][key]


def test_reduce_on_plateau() -> None:
    w = world()
    opt = steppe.SAM(sgdm(w))
    scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for batch in w.batches(3):
        opt.step(batch)
        scheduler.step(1.0)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.025)


def test_a_scheduler_survives_deepcopy_and_pickle_of_the_optimizer() -> None:
    w = world()
    opt = steppe.SAM(sgdm(w))
    lr_scheduler.StepLR(opt, 1)
    other_w, other = copy.deepcopy((w, opt))
    other.step(other_w.batch)
    assert not same_bits(w.parameters(), other_w.parameters())


def test_added_groups_get_a_rho_and_are_perturbed() -> None:
    w, extra, more = world(), nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(2))
    opt = steppe.SAM(sgd(w), rho=0.2)
    opt.step(w.batch)
    opt.add_param_group({"params": [extra], "lr": 0.5})
    opt.add_param_group({"params": [more], "rho": 0.0})
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.2, 0.0]
    seen = []

    def closure():
        opt.zero_grad()
        loss = w.batch.losses().mean() + (extra**2).sum()
        loss.backward()
        seen.append(extra.detach().clone())
        return loss

    opt.step(closure)
    assert torch.equal(seen[0], torch.ones(3, dtype=torch.float64))
    assert (seen[1] > 1).all()
    g_adv = 2 * seen[1]
    torch.testing.assert_close(extra.detach(), seen[0] - 0.5 * g_adv)
    assert opt.param_groups[1]["lr"] == 0.5


def test_a_group_with_rho_zero_is_not_perturbed_and_not_in_the_norm() -> None:
    """SAM-ON: only normalisation layers are perturbed, all are trained."""
    w = world()
    norms = list(w.model[1].parameters())
    rest = [p for p in w.parameters() if all(p is not q for q in norms)]
    before = [p.detach().clone() for p in rest]
    seen = []
    w.model.register_forward_hook(lambda *_: seen.append(([p.clone() for p in rest], [p.clone() for p in norms])))
    base = torch.optim.SGD([{"params": norms, "rho": 0.3}, {"params": rest, "rho": 0.0}], lr=0.1)
    opt = steppe.SAM(base)
    opt.step(w.batch)
    (rest_0, norms_0), (rest_1, norms_1) = seen
    assert same_bits(rest_0, rest_1)
    moved = torch.cat([b - a for a, b in zip(norms_0, norms_1, strict=True)])
    assert moved.norm().item() == pytest.approx(0.3)
    assert opt.telemetry.eps_norm.item() == pytest.approx(0.3)
    assert all(not torch.equal(p, q) for p, q in zip(rest, before, strict=True))


def test_step_without_closure_is_the_base_step_and_warns_once() -> None:
    ours, theirs = world(), world()
    opt, plain = steppe.SAM(sgdm(ours)), sgdm(theirs)
    for w in (ours, theirs):
        w.batch()
    with pytest.warns(UserWarning, match="not sharpness-aware") as caught:
        assert opt.step() is None
    assert caught[0].filename == __file__
    plain.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.batch()
        theirs.batch()
        opt.step(closure=None)
    plain.step()
    assert same_bits(ours.parameters(), theirs.parameters())


def test_step_without_closure_at_lr_zero_is_silent() -> None:
    w = world()
    opt = steppe.WSAM(torch.optim.AdamW(w.parameters(), lr=0.0, weight_decay=0.1))
    w.batch()
    before = w.weights()
    opt.step(closure=None)
    assert same_bits(before, w.parameters())
    assert opt.param_groups[0]["sharpness_step"] == 0


def test_a_closure_without_backward_is_named() -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    with pytest.warns(UserWarning, match=r"backward\(\)"):
        opt.step(lambda: w.batch.losses().mean())
    with pytest.raises(TypeError, match="return the loss"):
        opt.step(lambda: w.batch() and None)


def test_stale_gradients_do_not_enter() -> None:
    """The published WSAM example runs a backward before step(closure): g must not count twice."""
    ours, theirs = world(), world()
    a, b = steppe.WSAM(sgdm(ours)), steppe.WSAM(sgdm(theirs))

    def closure():  # without zeroing
        loss = ours.batch.losses().mean()
        loss.backward()
        return loss

    closure()
    a.step(closure)
    b.step(theirs.batch)
    assert_close(ours, theirs, atol=1e-14)


def test_hooks_run_once_a_step() -> None:
    w, seen = world(), []
    opt = steppe.SAM(sgdm(w))
    opt.register_step_pre_hook(lambda o, *_: seen.append(("pre", o is opt)))
    opt.register_step_post_hook(lambda o, *_: seen.append(("post", o is opt)))
    opt.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(w.parameters(), 1e-3) and None)
    opt.register_state_dict_post_hook(lambda o, state: state.update(extra=1))
    opt.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", True)))
    opt.step(w.batch)
    assert seen == [("pre", True), ("post", True)]
    norm = torch.cat([p.grad.reshape(-1) for p in w.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert opt.state_dict()["extra"] == 1
    opt.load_state_dict(opt.state_dict())
    assert seen[-1] == ("loaded", True)


def test_memory_is_apart_from_gradients_that_the_base_changes_in_place() -> None:
    rule = Rule(sample=steppe.Friendly(0.5, 0.0), combine=steppe.Weighted(0.5))  # remembers g, feeds g to the base
    w = world()
    opt = SharpnessAware(sgd(w), rule, 0.1)
    opt.base.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in w.parameters()] and None)
    w.batch()
    g = [p.grad.clone() for p in w.parameters()]
    opt.step(w.batch)
    for p, expected in zip(w.parameters(), g, strict=True):
        torch.testing.assert_close(opt.state[p]["sharpness.friendly"], expected)


def test_a_checkpoint_of_the_base_alone_loads() -> None:
    w = world()
    plain = sgdm(w)
    plain.step(w.batch)
    opt = steppe.SAM(sgdm(w), rho=0.2)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["rho"] == 0.2
    opt.step(w.batch)
    assert opt.telemetry.rho == 0.2


def test_a_checkpoint_holds_the_moments_and_not_the_weights() -> None:
    w = world()
    opt = steppe.SAM(sgdm(w))
    opt.step(w.batch)
    state = opt.state_dict()["state"]
    assert all(set(s) == {"momentum_buffer"} for s in state.values())
    fsam = steppe.FSAM(torch.optim.Adam(w.parameters()))
    fsam.step(w.batch)
    assert all(
        set(s) == {"step", "exp_avg", "exp_avg_sq", "sharpness.friendly"} for s in fsam.state_dict()["state"].values()
    )


def test_a_failed_load_changes_nothing() -> None:
    w, other = world(), world(model=lambda: nn.Linear(5, 3))
    opt, small = steppe.SAM(sgdm(w)), steppe.SAM(sgdm(other))
    opt.step(w.batch)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(small.state_dict())
    assert before["param_groups"] == opt.state_dict()["param_groups"]
    opt.step(w.batch)


BAD = [
    ("rho", lambda w: steppe.SAM(sgdm(w), rho=-0.1)),
    ("rho", lambda w: steppe.SAM(sgdm(w), rho=math.nan)),
    ("rho", lambda w: steppe.SAM(sgdm(w), rho=math.inf)),
    ("gamma", lambda w: steppe.WSAM(sgdm(w), gamma=1.0)),
    ("gamma", lambda w: steppe.WSAM(sgdm(w), gamma=-0.1)),
    ("gamma", lambda w: steppe.CoupledWSAM(sgdm(w), gamma=1.5)),
    ("gamma", lambda w: steppe.ESAM(sgdm(w), gamma=0.0)),
    ("beta", lambda w: steppe.ESAM(sgdm(w), beta=1.1)),
    ("lam", lambda w: steppe.UnifiedSAM(sgdm(w), lam=1.1)),
    ("lam", lambda w: steppe.RWSAM(sgdm(w), lam=-1.0)),
    ("eta", lambda w: steppe.ASAM(sgdm(w), eta=-1.0)),
    ("eta", lambda w: steppe.FisherSAM(sgdm(w), eta=-1.0)),
    ("alpha", lambda w: steppe.GSAM(sgdm(w), alpha=-1.0)),
    ("alpha", lambda w: steppe.LookSAM(sgdm(w), alpha=-1.0)),
    ("k", lambda w: steppe.LookSAM(sgdm(w), k=0)),
    ("sigma", lambda w: steppe.FSAM(sgdm(w), sigma=-1.0)),
    ("decay", lambda w: steppe.FSAM(sgdm(w), decay=1.5)),
    ("theta", lambda w: steppe.VaSSO(sgdm(w), theta=0.0)),
    ("length", lambda w: steppe.FiniteDifference(length=0.0)),
    ("probes", lambda w: steppe.FiniteDifference(probes=0)),
    ("factor", lambda w: steppe.Scaled(-1.0)),
    ("rho", lambda w: steppe.SAM(torch.optim.SGD([{"params": w.parameters(), "rho": -1.0}], lr=0.1))),
    ("maximize", lambda w: steppe.SAM(sgdm(w, maximize=True))),
    ("differentiable", lambda w: steppe.SAM(sgdm(w, differentiable=True))),
    ("parallel", lambda w: steppe.SAM(sgdm(w), parallel="yes")),
    ("rho", lambda w: steppe.SAM(sgdm(w), rho=lambda step, group: -1.0)),
    ("base", lambda w: steppe.SAM(steppe.SAM(sgdm(w)).base)),
]


@pytest.mark.parametrize(("name", "make"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_values_name_the_argument(name: str, make) -> None:
    with pytest.raises(ValueError, match=rf"\b{name} must be"):
        make(world())


@pytest.mark.parametrize("method", steppe.METHODS, ids=lambda m: m.__name__)
def test_m_must_be_a_positive_integer(method) -> None:
    w = world()
    base = torch.optim.Adam(w.parameters())  # which keeps all that any method reads
    for m in (0, -3, 2.5, True, "4"):
        with pytest.raises(ValueError, match="m must be a positive integer"):
            named(method, m=m)(base, w, 0.1)
    assert "rho" not in base.param_groups[0]


def test_bad_types() -> None:
    w = world()
    with pytest.raises(TypeError, match="base must be an optimizer instance"):
        steppe.SAM(torch.optim.SGD)
    with pytest.raises(TypeError, match="LBFGS"):
        steppe.SAM(torch.optim.LBFGS(w.parameters()))
    with pytest.raises(ValueError, match="not wrapped"):
        steppe.SAM(steppe.SAM(sgdm(w)))
    for bad in ("0.05", None, True, torch.tensor(0.05)):
        with pytest.raises(TypeError, match="rho"):
            steppe.SAM(sgdm(w), rho=bad)
    with pytest.raises(TypeError, match="real"):
        steppe.SAM(torch.optim.SGD([torch.ones(2, dtype=torch.complex64, requires_grad=True)], lr=0.1))
    with pytest.raises(TypeError, match="SparseAdam"):
        steppe.SAM(torch.optim.SparseAdam(w.parameters()))
    for full in (None, [w.batch]):
        with pytest.raises(TypeError, match="full must be a closure"):
            steppe.NSAM(sgdm(w), full=full)
    with pytest.raises(TypeError, match="rule"):
        SharpnessAware(sgdm(w), "SAM")
    with pytest.raises(TypeError, match="chek_finite"):
        steppe.SAM(sgdm(w), chek_finite=False)
    with pytest.raises(TypeError, match="full="):
        SharpnessAware(sgdm(w), Rule(sample=steppe.OnFull())).step(w.batch)


def test_nothing_of_the_base_is_changed_by_a_refused_argument() -> None:
    w = world()
    base = sgdm(w)
    before = copy.deepcopy(base.state_dict())
    missing = {"rho": lambda step, group: group["missing"]}
    for method, bad in (
        (steppe.SAM, {"rho": -1.0}),
        (steppe.SAM, missing),
        (steppe.SAM, {"chek": 1}),
        (steppe.WSAM, {"gamma": 2.0}),
        (steppe.SAM, {"sync": "all"}),
        (steppe.PreconditionedSAM, {}),  # which SGD keeps no moments for
    ):
        with pytest.raises((ValueError, TypeError, KeyError)):
            method(base, **bad)
    assert base.state_dict() == before


def test_a_bad_rho_set_later_is_refused_before_the_step() -> None:
    w = world()
    opt = steppe.SAM(torch.optim.SGD([{"params": w.parameters(), "rho": 0.1}], lr=0.1))
    opt.param_groups[0]["rho"] = -0.1
    before = w.weights()
    with pytest.raises(ValueError, match="rho"):
        opt.step(w.batch)
    assert same_bits(before, w.parameters())


def test_a_number_set_on_a_group_is_the_radius_from_then_on() -> None:
    w = world()
    opt = steppe.SAM(sgd(w), rho=0.1)
    opt.param_groups[0]["rho"] = 0.4
    opt.step(w.batch)
    assert opt.telemetry.eps_norm.item() == pytest.approx(0.4)


def test_sparse_gradients_are_refused_with_weights_in_place() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    opt = steppe.SAM(sgd(embedding))

    def closure():
        loss = embedding(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match="sparse=False"):
        opt.step(closure)
    assert torch.equal(before, embedding.weight)


def test_a_base_without_lr_is_refused_by_wsam_before_the_step() -> None:
    w = world()
    opt = steppe.WSAM(sgdm(w))
    del opt.param_groups[0]["lr"]
    before = w.weights()
    with pytest.raises(TypeError, match="lr"):
        opt.step(w.batch)
    assert same_bits(before, w.parameters())


def test_tied_weights_are_moved_once() -> None:
    w = world()
    tied = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    w.model = nn.Sequential(
        nn.Linear(5, 6, dtype=torch.float64), tied, nn.Tanh(), tied, nn.Linear(6, 3, dtype=torch.float64)
    )
    seen = []
    w.model.register_forward_hook(lambda *_: seen.append(torch.cat([p.reshape(-1) for p in w.parameters()])))
    opt = steppe.SAM(sgd(w), rho=0.3)
    opt.step(w.batch)
    assert (seen[1] - seen[0]).norm().item() == pytest.approx(0.3)


@pytest.mark.parametrize("case", METHODS, ids=lambda c: c.name)
def test_frozen_half_way_and_thawed(case) -> None:
    w = world(torch.float32)
    opt = optimizer(case, w, "adamw")
    for k, batch in enumerate(w.batches(6)):
        w.parameters()[0].requires_grad_(not 2 <= k < 4)
        before = w.parameters()[0].detach().clone()
        opt.step(batch)
        assert torch.equal(before, w.parameters()[0]) == (2 <= k < 4)


def test_views_into_one_buffer_stay_views() -> None:
    buffer = torch.randn(12)
    p = nn.Parameter(buffer[:6].view(2, 3))
    q = nn.Parameter(buffer[6:])

    def closure():
        loss = (p @ q[:3]).square().sum() + q.square().sum()
        loss.backward()
        return loss

    opt = steppe.WSAM(sgd([p, q]), rho=0.5)
    opt.step(closure)
    assert torch.equal(torch.cat([p.detach().reshape(-1), q.detach()]), buffer)


def test_gradients_that_live_in_a_bucket_are_copied() -> None:
    """A later pass writes into the same bucket, as under DDP with gradient_as_bucket_view."""
    w, theirs = world(), world()
    bucket = torch.zeros(sum(p.numel() for p in w.parameters()), dtype=torch.float64)
    opt, plain = steppe.WSAM(sgdm(w), 0.3), steppe.WSAM(sgdm(theirs), 0.3)

    def closure():
        loss = w.batch.losses().mean()
        grads = torch.autograd.grad(loss, w.parameters())
        bucket.copy_(torch.cat([g.reshape(-1) for g in grads]))
        for p, view in zip(w.parameters(), bucket.split([p.numel() for p in w.parameters()]), strict=True):
            p.grad = view.view_as(p)
        return loss

    opt.step(closure)
    plain.step(theirs.batch)
    assert_close(w, theirs, atol=1e-14)


def test_other_optimizers_of_the_same_model_see_their_own_gradients() -> None:
    w = world()
    first, rest = w.parameters()[:2], w.parameters()[2:]
    opt, other = steppe.SAM(sgd(first, lr=0.0)), sgd(rest)
    opt.step(w.batch)
    before = [p.detach().clone() for p in rest]
    other.step(w.batch)
    twin = world()
    twin.batch()
    for p, b, q in zip(rest, before, twin.parameters()[2:], strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * q.grad)


def test_a_base_that_is_changed_behind_the_wrapper() -> None:
    w, extra = world(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = steppe.SAM(sgdm(w), rho=0.2)
    opt.base.add_param_group({"params": [extra]})
    opt.step(w.batch)
    assert opt.param_groups[1]["rho"] == 0.2
    state = opt.base.state_dict()
    for group in state["param_groups"]:
        del group["rho"], group["sharpness_step"]
    opt.base.load_state_dict(state)
    opt.step(w.batch)
    assert opt.telemetry.rho == 0.2


def test_the_base_may_clear_gradients_after_its_step() -> None:
    w = world()
    opt = steppe.VaSSO(torch.optim.Adam(w.parameters()))
    opt.base.register_step_post_hook(lambda *_: opt.base.zero_grad())
    opt.step(w.batch)
    assert all("sharpness.smoothed" in opt.state[p] for p in w.parameters())


def test_a_bucket_of_one_parameter_is_copied_too() -> None:
    ends = []
    for bucketed in (False, True):
        p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        bucket = torch.zeros(3)

        def closure(p=p, bucket=bucket, bucketed=bucketed):
            (g,) = torch.autograd.grad((p**4).sum(), p)
            bucket.copy_(g)
            p.grad = bucket.view_as(p) if bucketed else g
            return (p.detach() ** 4).sum()

        opt = steppe.GSAM(sgd([p], lr=1e-3), 0.3)
        for _ in range(3):
            opt.step(closure)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_a_loss_in_memory_that_is_used_again() -> None:
    w, static = world(), torch.zeros((), dtype=torch.float64)

    def closure():
        w.model.zero_grad()
        loss = w.batch.losses().mean()
        loss.backward()
        return static.copy_(loss.detach())

    expected = w.batch.losses().mean()
    opt = steppe.SAM(sgdm(w), 0.3)
    torch.testing.assert_close(opt.step(closure), expected.detach())
    assert opt.telemetry.gap > 0


def test_mixed_types_of_parameters() -> None:
    layers = [nn.Linear(4, 4, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float64, torch.float16)]
    x = torch.randn(8, 4)
    parameters = [p for layer in layers for p in layer.parameters()]
    opt = steppe.GSAM(sgd(parameters), 0.1)

    def closure():
        opt.zero_grad()
        loss = sum(layer(x.to(layer.weight.dtype)).square().mean().double() for layer in layers)
        loss.backward()
        return loss

    before = closure().item()
    for _ in range(5):
        opt.step(closure)
    assert closure().item() < before


def test_grad_scaler_is_refused_with_what_to_write() -> None:
    w = world(torch.float32)
    opt = steppe.SAM(sgdm(w))
    scaler = torch.amp.GradScaler("cpu")
    before = w.weights()
    scaler.scale(w.batch.losses().mean()).backward()
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        scaler.step(opt)
    with pytest.raises(RuntimeError, match="scaler=scaler"):
        scaler.step(opt, w.batch)
    assert same_bits(before, w.parameters())


def test_bf16_autocast_in_the_loss() -> None:
    w = world(torch.float32)

    def loss(model, data):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").float()

    for method in (steppe.SAM, steppe.WSAM, steppe.RWSAM):
        opt = method(sgd(w))
        batch = steppe.Batch(w.model, loss, (w.x, w.y))
        first = float(opt.step(batch))
        for _ in range(10):
            last = float(opt.step(batch))
        assert last < first


@pytest.mark.parametrize("how", ["whole", "serial", "shared", "sharpest", "two calls"])
def test_autocast_around_the_step_casts_moved_weights_anew(how: str) -> None:
    """Its cache would keep the weights at ``w`` for every pass of the step and for all steps to come."""
    options = {"serial": {"m": 4, "parallel": False}, "shared": {"m": 4, "parallel": True}}.get(how, {})
    method = steppe.ESAM if how == "sharpest" else steppe.WSAM
    ends = []
    for around in (False, True):
        w = world(torch.float32)

        def loss(model, data):
            with torch.autocast("cpu", torch.bfloat16):
                return nn.functional.cross_entropy(model(data[0]).float(), data[1], reduction="none")

        opt = method(sgd(w, lr=0.5), rho=1.0, **options)
        batch = steppe.Batch(w.model, loss, (w.x, w.y))
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16) if around else nullcontext():
                if how == "two calls":
                    batch()
                    opt.first_step()
                    batch()
                    opt.second_step()
                else:
                    opt.step(batch)
        ends.append(w.weights())
    assert same_bits(*ends)


@pytest.mark.parametrize("case", METHODS, ids=lambda c: c.name)
def test_a_frozen_backbone_is_not_moved_and_not_in_the_way(case) -> None:
    w = world(torch.float32)
    for p in w.parameters()[:4]:
        p.requires_grad_(False)
    passes = []
    w.model.register_forward_hook(lambda *_: passes.append([p.detach().clone() for p in w.parameters()[:4]]))
    before = [p.detach().clone() for p in w.parameters()[:4]]
    opt = optimizer(case, w)
    opt._stepper.parallel = False  # a rehearsal shakes all parameters for a moment
    for batch in w.batches(6):
        opt.step(batch)
        seen = opt.telemetry
        assert seen.eps_norm is None or seen.eps_norm > 0 or (case.name == "MomentumSAM" and seen.steps == 1)
    assert all(same_bits(before, frozen) for frozen in passes)


def test_subclasses_of_batch_and_kinds_of_data_survive_splitting() -> None:
    from collections import UserDict

    class Doubled(steppe.Batch):
        def losses(self):
            return 2 * super().losses()

    w = world()
    data = UserDict(x=w.x, y=w.y, mask=None)
    loss = lambda model, d: w.criterion(model(d["x"]), d["y"])  # noqa: E731
    batch = Doubled(w.model, loss, data)
    parts = batch.split(4)
    assert [type(p) for p in parts] == [Doubled] * 3
    assert all(type(p.data) is UserDict and p.data["mask"] is None for p in parts)
    torch.testing.assert_close(torch.cat([p.losses() for p in parts]), batch.losses())
    assert len(data["x"]) == 10


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ((torch.ones(3), torch.ones(4)), ValueError),
        ((), ValueError),
        (torch.tensor(1.0), ValueError),
        (torch.ones(0, 2), ValueError),
        ({"x": torch.ones(3), "y": object()}, TypeError),
    ],
)
def test_bad_data(data, error) -> None:
    with pytest.raises(error, match="data"):
        steppe.Batch(nn.Linear(1, 1), lambda m, d: d, data)


def test_bad_batches() -> None:
    w = world()
    with pytest.raises(TypeError, match="model"):
        steppe.Batch(lambda x: x, lambda m, d: d, w.x)
    with pytest.raises(TypeError, match="loss"):
        steppe.Batch(w.model, None, w.x)
    with pytest.raises(ValueError, match='reduction="none"'):
        steppe.Batch.supervised(w.model, nn.CrossEntropyLoss(), w.x, w.y)
    with pytest.raises(ValueError, match="one loss per example"):
        steppe.Batch(w.model, lambda m, d: m(d).sum(), w.x).losses()


def test_world_is_what_the_tests_think() -> None:
    assert isinstance(world(), World)
    assert len({case.name for case in METHODS} & {m.__name__ for m in steppe.METHODS}) == len(steppe.METHODS)


def test_a_step_of_the_base_at_lr_zero_forgets_nothing() -> None:
    """It makes room for a distributed checkpoint where there is no memory, and only there."""
    w, other = world(), world()
    a, b = (steppe.FSAM(sgd(each), rho=0.1) for each in (w, other))
    for opt, each in ((a, w), (b, other)):
        opt.step(each.batch)
    a.param_groups[0]["lr"] = 0.0
    a.step()
    a.param_groups[0]["lr"] = 0.1
    assert all(
        torch.equal(t, b.state[q][k])
        for p, q in zip(w.parameters(), other.parameters(), strict=True)
        for k, t in a.state[p].items()
        if k.startswith("sharpness.")
    )
    a.step(w.batch)
    b.step(other.batch)
    assert same_bits(w.parameters(), other.parameters())


def test_a_mask_may_keep_tensors_alone_that_nobody_uses() -> None:
    """The closure's loss must have a graph all the same; eps is then 0."""
    w, other = world(), world()
    unused = [nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(30)]
    a = steppe.ESAM(sgd([*unused, *w.parameters()]), beta=1e-3, gamma=1.0)
    b = sgd(other)
    a.step(lambda: w.batch())
    b.step(lambda: other.batch())
    assert a.telemetry.eps_norm == 0
    assert same_bits(w.parameters(), other.parameters())


def test_memory_stays_where_a_step_has_no_gradient() -> None:
    """As in the authors' code, which passes over parameters without one."""
    u, v = (nn.Linear(2, 2) for _ in range(2))
    opt = steppe.FSAM(sgd([u.weight, v.weight], lr=0.0), rho=0.1, decay=0.5)
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        opt.zero_grad()
        y = v(torch.ones(2)).sum()
        if calls <= 2 or calls % 2 == 0:  # after the first step, no gradient at w
            y = y + 3 * u(torch.ones(2)).sum()
        y.backward()
        return y

    with torch.enable_grad():
        for _ in range(3):
            opt.step(closure)
    for p, g in ((u.weight, 3.0), (v.weight, 1.0)):
        assert torch.equal(opt.state[p]["sharpness.friendly"], torch.full((2, 2), g))


def test_a_checkpoint_of_0_1_loads_and_resumes() -> None:
    """The keys that 0.1 wrote, by hand: ``rho`` and ``sharpness_step`` in groups, ``sharpness.NAME`` in states."""
    ours, theirs = world(), world()
    a, b = (steppe.FSAM(torch.optim.Adam(w.parameters(), lr=0.01), rho=0.1) for w in (ours, theirs))
    batches = ours.batches(4)
    for batch in batches[:2]:
        a.step(batch)
    written = a.state_dict()
    assert {"rho", "sharpness_step"} <= written["param_groups"][0].keys()
    assert all(
        state.keys() == {"step", "exp_avg", "exp_avg_sq", "sharpness.friendly"} for state in written["state"].values()
    )
    saved = {
        "state": {i: {k: v.clone() for k, v in state.items()} for i, state in written["state"].items()},
        "param_groups": copy.deepcopy(written["param_groups"]),
    }
    theirs.model.load_state_dict(ours.model.state_dict())
    b.load_state_dict(saved)
    for mine, other in zip(batches[2:], theirs.batches(4)[2:], strict=True):
        a.step(mine)
        b.step(other)
    assert same_bits(ours.weights(), theirs.parameters())


def test_a_joint_optimizer_loads_nothing_of_a_checkpoint_that_does_not_fit() -> None:
    w = world()
    a, b = w.parameters()[:2], w.parameters()[2:]
    joint = steppe.Joint([sgd(a, lr=0.1), sgd(b, lr=0.2)])
    other = {"bases": [sgd(a, lr=9.0).state_dict(), sgd(w, lr=9.0).state_dict()]}
    with pytest.raises(ValueError, match=r"others for bases\[1\], SGD"):
        joint.load_state_dict(other)
    assert [group["lr"] for group in joint.param_groups] == [0.1, 0.2]
    other["bases"][1] = sgd(b, lr=9.0).state_dict()
    joint.load_state_dict(other)
    assert [group["lr"] for group in joint.param_groups] == [9.0, 9.0]


def test_a_model_and_a_criterion_that_are_swapped_are_told() -> None:
    w = world()
    with pytest.raises(TypeError, match=r"model and criterion are swapped: write Batch\.supervised\(model, criterion"):
        steppe.Batch.supervised(w.criterion, w.model, w.x, w.y)
