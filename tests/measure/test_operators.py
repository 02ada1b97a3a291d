import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.engine.vector import Vector
from steppe.measure import (
    CentralDifference,
    EmpiricalFisher,
    GaussNewton,
    GradientCovariance,
    Hessian,
    Operator,
    Problem,
)

from .models import CRITERION, batches, data, dense, hessian, losses, net, problem

OPERATORS = {kind.__name__: kind for kind in (Hessian, GaussNewton, EmpiricalFisher, GradientCovariance)}


def probe(A: Operator, seed: int = 3) -> torch.Tensor:
    like = A.like[0]
    return torch.randn(A.shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)


def differences(problem: Problem) -> Hessian:
    return Hessian(problem, CentralDifference())


@pytest.mark.parametrize("kind", OPERATORS)
def test_products_are_those_of_the_dense_matrix(kind):
    A = OPERATORS[kind](problem())
    v, D = probe(A), dense(kind, net(), data())
    assert A.shape == D.shape
    assert (A @ v - D @ v).norm() < 1e-12 * (D @ v).norm()


def test_the_average_counts_examples_however_they_are_batched():
    xy, model = data(), net()
    H = Hessian(Problem(model, CRITERION, xy))
    v = probe(H)
    ways = [
        Problem(model, CRITERION, batches(xy, 5, 16, 2)),
        Problem(model, CRITERION, xy, batch_size=4),
        Problem(model, CRITERION, DataLoader(TensorDataset(*xy), batch_size=7)),
        Problem(model, CRITERION, DataLoader(TensorDataset(*xy), batch_size=7, shuffle=True)),
        Problem(model, lambda model, d: losses(model, (d["x"], d["y"])), {"x": xy[0], "y": xy[1]}),
    ]
    for way in ways:
        assert way.n == 23
        torch.testing.assert_close(Hessian(way) @ v, H @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["Hessian", "GaussNewton", "EmpiricalFisher"])
def test_agrees_with_curvlinops(kind):
    theirs = {"Hessian": "Hessian", "GaussNewton": "GGN", "EmpiricalFisher": "EF"}[kind]
    model = net()
    A = OPERATORS[kind](problem(model))
    v = probe(A)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit, when it is imported
        curvlinops = pytest.importorskip("curvlinops")
        other = getattr(curvlinops, f"{theirs}LinearOperator")(
            model, nn.CrossEntropyLoss(), list(model.parameters()), batches(data(), 5, 16, 2)
        )
        expected = other @ v
    torch.testing.assert_close(A @ v, expected, rtol=1e-10, atol=1e-12)


class Awkward(nn.Module):
    """Batch norm, dropout, a tied weight, a parameter that takes no part, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.drop, self.idle = nn.Dropout(0.3), nn.Linear(2, 2)
        self.b.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(self.drop(torch.tanh(self.a(self.norm(self.a(x))))))


def awkward() -> nn.Module:
    torch.manual_seed(0)
    return Awkward().double()


def everything(model):
    tensors = [t.clone() for t in model.state_dict().values()]
    tensors += [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    return tensors, [m.training for m in model.modules()], torch.get_rng_state()


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("kind", [*OPERATORS.values(), differences])
def test_a_product_leaves_everything_as_it_was(kind, mode):
    model = awkward()
    model.drop.eval()  # modes are mixed
    losses(model, data()).mean().backward()
    rows = TensorDataset(*data(22))  # a last batch of one example has no variance
    loader = DataLoader(rows, batch_size=11, shuffle=True)
    before, grads = everything(model), [p.grad for p in model.parameters()]
    A = kind(Problem(model, CRITERION, loader, mode=mode))
    v = probe(A)
    first, again = A @ v, A @ v
    assert torch.equal(first, again)  # the same order and masks each time
    after = everything(model)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_modes_measure_what_they_say(mode):
    model = awkward()
    model.norm.running_mean.fill_(0.3)
    model.drop.p = 0.0
    H = Hessian(Problem(model, CRITERION, data(), mode=mode))
    reference = copy.deepcopy(model).train(mode == "train")
    D = hessian(losses(reference, data()).mean(), [p for p in reference.parameters() if p.requires_grad])
    v = probe(H)
    assert H.shape == D.shape
    torch.testing.assert_close(H @ v, D @ v, rtol=1e-10, atol=1e-12)
    idle = sum(p.numel() for p in model.idle.parameters())
    assert torch.equal((H @ v)[-idle:], torch.zeros(idle, dtype=torch.float64))


def test_vectors_with_and_without_entries():
    H = Hessian(problem())
    v = Vector([torch.ones_like(p) if i else None for i, p in enumerate(H.like)])
    flat = torch.cat([torch.zeros(28), torch.ones(7 + 21 + 3)]).double()
    product = torch.cat([t.reshape(-1) for t in (H @ v).materialised()])
    torch.testing.assert_close(product, H @ flat)
    for wrong in (torch.ones(3), Vector([torch.ones(3)] * 4), Vector([None])):
        with pytest.raises(ValueError, match="v must have"):
            H @ wrong


def test_a_linear_model_has_no_curvature_and_gauss_newton_of_a_linear_loss_none():
    class Sum(nn.Module):
        def forward(self, z, y):
            return z.sum(1)

    model = nn.Linear(4, 2).double()
    linear = Problem(model, Sum(), data())
    for kind in (Hessian, GaussNewton):
        assert (kind(linear) @ torch.ones(10, dtype=torch.float64)).abs().max() == 0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x.view(-1, 2, 3, 4)).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def test_attention_runs_a_kernel_that_can_be_differentiated_twice():
    torch.manual_seed(0)
    model, x, y = Attention().double(), torch.randn(6, 24).double(), torch.arange(6) % 3
    A = Hessian(Problem(model, CRITERION, (x, y)))
    v, h = probe(A), 1e-5
    parameters = list(model.parameters())

    def g(c):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, t in zip(moved.parameters(), v.split([p.numel() for p in parameters]), strict=True):
                p.add_(t.view_as(p), alpha=c)
        grads = torch.autograd.grad(losses(moved, (x, y)).mean(), list(moved.parameters()))
        return torch.cat([t.reshape(-1) for t in grads])

    torch.testing.assert_close(A @ v, (g(h) - g(-h)) / (2 * h), rtol=1e-5, atol=1e-8)


def test_bfloat16_models_get_float32_products_at_their_weights():
    low = net(torch.bfloat16)
    low.register_buffer("unused", torch.ones(2, dtype=torch.bfloat16))
    xy = data(dtype=torch.bfloat16)
    wide = copy.deepcopy(low).double()
    D = hessian(losses(wide, (xy[0].double(), xy[1])).mean(), list(wide.parameters()))
    A = Hessian(Problem(low, CRITERION, xy))
    v = probe(A)
    assert v.dtype == torch.float32
    torch.testing.assert_close((A @ v).double(), D @ v.double(), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        low[0].weight.mul_(0.5)  # the weights move on: so do the products
        wide[0].weight.mul_(0.5)
    D = hessian(losses(wide, (xy[0].double(), xy[1])).mean(), list(wide.parameters()))
    torch.testing.assert_close((A @ v).double(), D @ v.double(), rtol=1e-4, atol=1e-6)
    moved = differences(Problem(low, CRITERION, xy)) @ v
    assert (moved.double() - D @ v.double()).norm() < 2e-3 * (D @ v.double()).norm()
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in low.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_run_their_eager_code(whole):
    model, xy = net(), data()
    exact = Hessian(Problem(model, CRITERION, xy))
    v = probe(exact)
    expected = exact @ v
    compiled = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        model[0].compile(backend="aot_eager")
    compiled(xy[0]).sum().backward()
    torch.testing.assert_close(Hessian(Problem(compiled, CRITERION, xy)) @ v, expected)


def test_gauss_newton_needs_a_criterion():
    with pytest.raises(TypeError, match="GaussNewton needs"):
        GaussNewton(Problem(net(), losses, data()))


def test_weights_come_back_bit_for_bit_when_a_pass_raises():
    model, calls = net(), [0]

    def loss(model, d):
        calls[0] += 1
        if calls[0] > 3:
            raise KeyError("broken")
        return losses(model, d)

    A = differences(Problem(model, loss, data()))
    before = everything(model)
    with pytest.raises(KeyError, match="broken"):
        A @ probe(A)
    after = everything(model)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


def test_both_products_agree_in_training_mode():
    whole = Problem(awkward(), CRITERION, batches(data(22), 11, 11), mode="train")
    exact = Hessian(whole)
    v = probe(exact)
    assert (exact @ v - differences(whole) @ v).norm() < 1e-6 * (exact @ v).norm()
