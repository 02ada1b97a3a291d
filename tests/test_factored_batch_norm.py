"""Batch normalisation in shared passes: each micro-batch by its own statistics, as in the serial loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from steppe.factored import gradient_statistics
from tests.cases import sgdm

N = 12


class Normed(nn.Module):
    """One, two and three dimensions; a module used twice; the output is changed in place."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, **options)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.norm_three = nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, **options)
        self.dense, self.norm_dense = nn.Linear(16, 8), nn.BatchNorm1d(8, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_one(self.one(x)), inplace=True)
        x = self.norm_one(x + self.two(x))
        z = self.norm_three(self.three(x[:, None])).flatten(1)
        return self.head(F.relu(self.norm_dense(self.dense(z))))


def mlp(**options) -> nn.Module:
    return nn.Sequential(nn.Linear(72, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 3))


def ends(make, method, m: int | None, steps: int = 3, n: int = N, dtype=torch.float64) -> list[nn.Module]:
    """The model after some steps, in shared passes and in the serial loop."""
    found = []
    for parallel in ("auto", False):
        torch.manual_seed(0)
        model = make().to(dtype)
        opt = method(sgdm(model), rho=0.2, m=m, parallel=parallel)
        for _ in range(steps):
            x = torch.randn(n, 2, 6, 6, dtype=dtype)
            x = x.flatten(1) if isinstance(model, nn.Sequential) else x
            opt.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, torch.randint(3, (n,))))
        found.append(model)
    return found


def assert_equal(found: list[nn.Module], tolerance: float) -> None:
    ours, theirs = (model.state_dict() for model in found)
    for name, t in theirs.items():  # weights, running statistics, counters
        torch.testing.assert_close(
            ours[name], t, rtol=tolerance, atol=tolerance, msg=lambda s, name=name: f"{name}: {s}"
        )


OPTIONS = {
    "default": {},
    "momentum 0.4": {"momentum": 0.4},
    "average": {"momentum": None},
    "no scale": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


def vectors(model: nn.Module, n: int = N) -> steppe.Batch:
    loss = nn.CrossEntropyLoss(reduction="none")
    return steppe.Batch.supervised(model, loss, torch.randn(n, 72), torch.randint(3, (n,)))


def shares(make, m: int, n: int = N) -> bool:
    """Whether the plan of this model allows shared passes; the whole batch goes through the model in each forward."""
    torch.manual_seed(0)
    model, sizes = make(), []
    opt = steppe.SAM(sgdm(model), rho=0.2, m=m)
    batch = vectors(model, n)
    opt.step(batch)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    opt.step(batch)
    return sizes[-2:] == [n, n]


@pytest.mark.parametrize("m", [2, 3, 5, 6, N])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_serial_loop(options: str, m: int) -> None:
    assert_equal(ends(lambda: Normed(**OPTIONS[options]), steppe.SAM, m), 1e-10)
    assert_equal(ends(lambda: mlp(**OPTIONS[options]), steppe.SAM, m), 1e-10)
    assert shares(mlp, m) or m >= N / 2  # two micro-batches are as fast one after the other


def test_float32() -> None:
    assert_equal(ends(Normed, steppe.SAM, 3, dtype=torch.float32, steps=1), 1e-4)


def test_one_example_in_a_micro_batch() -> None:
    layers = [nn.Unflatten(1, (2, 6, 6)), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)]
    conv = lambda: copy.deepcopy(nn.Sequential(*layers))  # noqa: E731
    assert shares(conv, 1)
    assert_equal(ends(conv, steppe.SAM, 1), 1e-10)
    for parallel in ("auto", False):  # one value a channel: torch refuses it, here as there
        model = mlp()
        opt = steppe.SAM(sgdm(model), m=5, parallel=parallel)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            opt.step(vectors(model, 11))


@pytest.mark.parametrize("method", ["USAM", "WSAM", "CoupledWSAM", "GSAM", "ASAM", "LookSAM"])
def test_other_methods(method: str) -> None:
    assert_equal(ends(Normed, getattr(steppe, method), 4), 1e-10)


def test_layers_before_any_parameter_frozen_scales_and_a_new_m() -> None:
    class Input(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = nn.BatchNorm2d(2, affine=False), Normed()
            self.net.norm_one.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.norm(x))

    assert_equal(ends(Input, steppe.SAM, 3), 1e-10)
    found = []
    for parallel in ("auto", False):
        torch.manual_seed(0)
        model = Normed().double()
        for m, n in ((3, N), (4, N), (3, N), (4, 10), (3, N)):
            opt = steppe.SAM(sgdm(model), rho=0.2, m=m, parallel=parallel)
            data = torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.randint(3, (n,))
            opt.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), *data))
        found.append(model)
    assert_equal(found, 1e-10)


def test_evaluation_mode_is_an_affine_map() -> None:
    def frozen() -> nn.Module:
        model = Normed()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.running_mean.normal_()
        return model

    assert_equal(ends(frozen, steppe.SAM, 1), 1e-10)


def test_channels_last_and_autocast() -> None:
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        model = model.to(memory_format=torch.channels_last)

        def loss(model, data):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(data[0]).float(), data[1], reduction="none")

        opt = steppe.SAM(sgdm(model), rho=0.05, m=4, parallel=parallel)
        before = copy.deepcopy(model.state_dict())
        x = torch.randn(N, 2, 6, 6).to(memory_format=torch.channels_last)
        opt.step(steppe.Batch(model, loss, (x, torch.randint(3, (N,)))))
        found.append(torch.cat([(t - before[k]).flatten().float() for k, t in model.state_dict().items()]))
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


def test_gradients_of_single_examples_are_refused() -> None:
    """They are not defined; micro-batches of the same model share passes afterwards."""
    batch = vectors(mlp())
    with pytest.raises(ValueError, match="batch normalisation mixes examples"):
        gradient_statistics(batch)
    reweighted = steppe.Rule(sample=steppe.Reweighted(0.5, steppe.Exact()))
    opt = steppe.SharpnessAware(sgdm(batch.model), steppe.Micro(4, reweighted), 0.1, parallel=True)
    with pytest.raises(ValueError, match="batch normalisation mixes examples"):
        opt.step(batch)
    steppe.SAM(sgdm(batch.model), m=3, parallel=True).step(batch)


def test_an_error_after_the_forward_leaves_no_trace_in_running_statistics() -> None:
    class Late(torch.autograd.Function):
        broken = False

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, d):
            if Late.broken and len(d) == N:
                raise RuntimeError("out of memory")
            return d

    found = []
    for parallel in ("auto", False):
        torch.manual_seed(0)
        model, Late.broken = mlp().double(), False
        opt = steppe.SAM(sgdm(model), rho=0.2, m=3, parallel=parallel)
        for step in range(3):
            Late.broken = step == 2
            data = torch.randn(N, 72, dtype=torch.float64), torch.randint(3, (N,))
            loss = nn.CrossEntropyLoss(reduction="none")
            opt.step(steppe.Batch(model, lambda m, d, loss=loss: loss(Late.apply(m(d[0])), d[1]), data))
        found.append(model)
    assert_equal(found, 1e-10)


def test_running_statistics_of_unknown_owners_run_in_the_loop() -> None:
    class Own(nn.Module):
        """A counter that only this class knows how to advance."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = nn.Linear(72, 8), nn.Linear(8, 3)
            for name, t in (("mean", torch.zeros(8)), ("var", torch.ones(8)), ("num_batches_tracked", torch.tensor(0))):
                self.register_buffer(name, t)

        def forward(self, x: Tensor) -> Tensor:
            self.num_batches_tracked += 1
            return self.head(F.batch_norm(self.net(x.flatten(1)), self.mean, self.var, training=True))

    with pytest.warns(UserWarning, match="running statistics are kept by something else"):
        assert_equal(ends(Own, steppe.SAM, 3), 1e-12)
    model = Own()
    opt = steppe.SAM(sgdm(model), m=3, parallel=True)
    with pytest.raises(ValueError, match="running statistics"):
        opt.step(vectors(model))
