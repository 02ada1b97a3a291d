"""A further pass changes neither normalisation statistics nor the random stream."""

import copy

import pytest
import torch
from torch import nn

import steppe
from steppe.engine.passes import frozen_statistics
from tests.cases import CASES, N, World, optimizer, same_bits, sgd, world
from tests.models import Dropout, Faulty


class OwnNorm(nn.Module):
    """A custom normalisation with running statistics that binds a new tensor at every forward."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.seen += 1
        return x - self.mean


class Strange(nn.Module):
    """Batch norm of every kind, instance norm, spectral norm, a custom norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.two = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2, momentum=None), nn.Tanh())
        self.three = nn.InstanceNorm1d(2, track_running_stats=True)
        self.last = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.own = OwnNorm(3)

    def forward(self, x):
        x = self.one(x).view(-1, 1, 2, 3)
        x = self.three(self.two(x).flatten(2))
        return self.own(self.last(x.flatten(1)))


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def closure_of(w: World, opt: torch.optim.Optimizer, forward=None):
    def closure():
        opt.zero_grad()
        loss = w.criterion((forward or w.model)(w.x), w.y).mean()
        loss.backward()
        return loss

    return closure


WHOLE = [c for c in CASES if "m" not in c.name.split("-")[0] and "micro" not in c.name]
no_full = [c for c in WHOLE if "NSAM" not in c.name and not c.name.startswith("n-")]


@pytest.mark.parametrize("case", no_full, ids=lambda c: c.name)
@pytest.mark.parametrize("plain", [True, False], ids=["plain closure", "Batch"])
def test_statistics_after_a_step_are_those_of_one_forward(case, plain: bool) -> None:
    if plain and case.looks_inside:
        case = CASES[0]
    w, reference = world(torch.float32, Strange), world(torch.float32, Strange)
    opt = optimizer(case, w, rho=0.5)
    for _ in range(3):
        reference.model.load_state_dict(w.model.state_dict())
        reference.model(w.x)
        opt.step(closure_of(w, opt) if plain else w.batch)
        for name, expected in buffers(reference.model).items():
            assert torch.equal(w.model.get_buffer(name), expected), name


def test_the_statistics_of_n_sam_are_those_of_the_larger_batch() -> None:
    w, reference = world(torch.float32, Strange), world(torch.float32, Strange)
    steppe.NSAM(sgd(w), 0.5, full=w.full).step(w.batch)
    reference.model(w.full_x)
    for name, expected in buffers(reference.model).items():
        assert torch.equal(w.model.get_buffer(name), expected), name


def test_micro_batches_count_every_example_once() -> None:
    w, reference = world(torch.float32, Strange), world(torch.float32, Strange)
    steppe.SAM(sgd(w), 0.5, m=4, parallel=False).step(w.batch)
    for part in w.x.split(4):
        reference.model(part)
    for name, expected in buffers(reference.model).items():
        assert torch.equal(w.model.get_buffer(name), expected), name


@pytest.mark.filterwarnings("ignore:a gradient is not finite")
@pytest.mark.parametrize("mode", ["inf", "raise"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain closure", "Batch"])
def test_statistics_survive_a_bad_second_pass(mode: str, plain: bool) -> None:
    """Infinity comes before the normalisation, an error after it: both where the weights are away from w."""
    first = nn.Linear(5, 3)
    inf = Faulty(first, how=torch.inf) if mode == "inf" else first
    raises = Faulty(nn.Sequential(inf, nn.BatchNorm1d(3)), how=RuntimeError("out of memory"))
    w = world(torch.float32, lambda: raises)
    opt = steppe.SAM(sgd(w), 0.5)
    closure = closure_of(w, opt) if plain else w.batch
    opt.step(closure)
    reference = copy.deepcopy(w)
    reference.model(w.x)
    home = first.weight.detach().clone()
    (inf if mode == "inf" else raises).fail_at = lambda *_: not torch.equal(first.weight, home)
    before = w.weights()
    if mode == "raise":
        with pytest.raises(RuntimeError, match="out of memory"):
            opt.step(closure)
    else:
        opt.step(closure)
        assert opt.telemetry.was_skipped
    assert same_bits(before, w.parameters())
    for name, expected in buffers(reference.model).items():
        assert torch.equal(w.model.get_buffer(name), expected), name
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    assert not hooks  # the hook is active only during the pass


@pytest.mark.parametrize("how", ["compiled", "compiled function", "forward", "eager"])
def test_statistics_of_models_that_hooks_do_not_reach(how: str) -> None:
    normed = lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))  # noqa: E731
    w, reference = world(torch.float32, normed), world(torch.float32, normed)
    forward = {
        "compiled": lambda: torch.compile(w.model, backend="eager"),
        "compiled function": lambda: torch.compile(lambda x: w.model(x), backend="eager"),
        "forward": lambda: w.model.forward,
        "eager": lambda: w.model,
    }[how]()
    opt = steppe.SAM(sgd(w), 0.5)

    closure = closure_of(w, opt, forward)
    for _ in range(2):
        reference.model.load_state_dict(w.model.state_dict())
        reference.model(w.x)
        opt.step(closure)
        for name, expected in buffers(reference.model).items():
            torch.testing.assert_close(w.model.get_buffer(name), expected)


def test_statistics_given_for_the_call_alone() -> None:
    """functional_call swaps buffers in: they are put back in their own place."""
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    own = model[1].running_mean
    given = {name: b.clone() for name, b in model.named_buffers()}
    opt = steppe.SAM(sgd(model), 0.5)
    x = torch.randn(8, 5)

    def closure():
        opt.zero_grad()
        loss = torch.func.functional_call(model, given, x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert model[1].running_mean is own
    assert own.tolist() == [0.0] * 3
    assert given["1.num_batches_tracked"] == 1


def test_a_buffer_that_nothing_changes_keeps_its_version() -> None:
    """Autograd compares versions, so a table of positions may be used before and after."""
    model = nn.BatchNorm1d(3)
    model.register_buffer("positions", torch.arange(3))
    model.register_buffer("secret", torch.zeros(3))
    version = model.positions._version
    with frozen_statistics([model]):
        model(torch.randn(4, 3))
        with torch.autograd._unsafe_preserve_version_counter(model.secret):
            model.secret.fill_(1.0)
    assert model.positions._version == version
    assert model.running_mean.tolist() == [0.0] * 3  # torch's batch norm leaves the version, too
    assert model.secret.tolist() == [0.0] * 3  # whatever its version says


def test_modules_in_eval_mode_are_left_alone() -> None:
    model = nn.BatchNorm1d(3).eval()
    with frozen_statistics():
        model(torch.randn(4, 3))
        model.running_mean.add_(1.0)  # somebody else's business
    assert model.running_mean.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("case", no_full, ids=lambda c: c.name)
def test_every_pass_drops_the_same_units_and_the_stream_goes_on_as_after_one(case) -> None:
    w = world(torch.float32, Dropout)
    opt = optimizer(case, w)
    for _ in range(5):
        opt.step(w.batch)  # the steps 1, 2, 3 and 5 may rehearse
    torch.manual_seed(7)
    steps = []
    for _ in range(3):
        w.model.masks.clear()
        opt.step(w.batch)
        steps.append([m for m in w.model.masks if len(m) == N])
    after = torch.rand(3)
    torch.manual_seed(7)
    expected = [nn.functional.dropout(torch.ones(N, 40), 0.5) for _ in range(3)]
    assert torch.equal(after, torch.rand(3))
    assert max(map(len, steps)) >= (1 if case.selects or "AESAM" in case.name else 2)
    for masks, mask in zip(steps, expected, strict=True):
        assert masks
        assert all(torch.equal(mask, m) for m in masks)


def test_micro_batches_have_their_own_masks_and_repeat_them() -> None:
    w = world(torch.float32, Dropout)
    steppe.SAM(sgd(w), 0.5, m=5, parallel=False).step(w.batch)
    a, a_again, b, b_again = w.model.masks
    assert torch.equal(a, a_again)
    assert torch.equal(b, b_again)
    assert not torch.equal(a, b)
