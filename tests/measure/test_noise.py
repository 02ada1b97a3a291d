import pytest
import torch
from torch import nn

from steppe.measure import GradientCovariance, Hessian, Problem, alignment, eigenpairs, gradient_noise

from .models import CRITERION, Dense, batches, data, dense, jacobian, losses, net, problem, spread


class Gated(nn.Module):
    """A branch on data does not factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.a(row) if row.sum() > 0 else self.b(row) for row in x])


class Bilinear(nn.Module):
    """A parameter used twice in a product with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ (self.w * self.w.sum(1, keepdim=True).tanh())


def check(model, given, xy):
    found = gradient_noise(Problem(model, CRITERION, given))
    G = jacobian(losses(model, xy), list(model.parameters()))
    torch.testing.assert_close(found.norms, G.norm(dim=1))
    g = G.mean(0)
    assert found.g_norm == pytest.approx(float(g.norm()))
    assert found.trace == pytest.approx(float(torch.cov(G.T, correction=0).trace()))
    assert found.scale == pytest.approx(found.trace / found.g_norm**2)


@pytest.mark.parametrize(("kind", "loops"), [(net, False), (Bilinear, False), (Gated, True)])
def test_noise_of_models_that_factor_or_not(kind, loops, caplog):
    torch.manual_seed(0)
    caplog.set_level("DEBUG", "steppe")
    check(kind().double(), data() if loops else batches(data(), 5, 16, 2), data())
    assert ("in a loop" in caplog.text) == loops


def test_bfloat16_models():
    low, xy = net(torch.bfloat16), data(dtype=torch.bfloat16)
    found = gradient_noise(Problem(low, CRITERION, xy))
    wide = net(torch.bfloat16).float()
    exact = gradient_noise(Problem(wide, CRITERION, (xy[0].float(), xy[1])))
    torch.testing.assert_close(found.norms, exact.norms, rtol=1e-4, atol=1e-6)


def test_mixing_examples_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    with pytest.raises(ValueError, match="BatchNorm1d is in training mode"):
        gradient_noise(Problem(model, CRITERION, data(), mode="train"))
    check(model.eval(), data(), data())

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x):
            z = self.a(x)
            return torch.tanh(z - z.mean(0))

    with pytest.raises(ValueError, match="do not add up"):
        gradient_noise(Problem(Centred().double(), CRITERION, data()))


def test_alignment_is_the_cosine_of_dense_matrices():
    V, H = dense("GradientCovariance", net(), data()), dense("Hessian", net(), data())
    cosine = float((V * H).sum() / (V.norm() * H.norm()))
    whole = problem()
    found = alignment(GradientCovariance(whole), Hessian(whole), tol=0.01, most=2000)
    assert found.converged
    assert abs(found.value - cosine) < 3.5 * found.error


def test_alignment_of_equal_and_opposite_matrices():
    A = spread()
    assert alignment(A, Dense(2 * A.D)).value == pytest.approx(1)
    assert alignment(A, Dense(-A.D)).value == pytest.approx(-1)


def test_the_covariance_has_the_noise_trace():
    whole = problem()
    values = eigenpairs(GradientCovariance(whole), 23, most=59, tol=1e-2).values
    assert sum(values) == pytest.approx(gradient_noise(whole).trace, rel=1e-9)
