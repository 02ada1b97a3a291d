import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from steppe.measure import (
    Hessian,
    NotConverged,
    eigenpairs,
    hutch_pp,
    hutchinson,
    power_iteration,
    spectral_density,
)

from .models import Dense, data, dense, net, problem, quadratic, spread


def test_power_iteration_finds_the_largest_in_absolute_value_and_lanczos_the_end():
    H = Hessian(quadratic([5.0, -7.0, 1.0]))
    assert power_iteration(H, tol=1e-9).value == pytest.approx(-7, abs=1e-6)
    assert eigenpairs(H).value == pytest.approx(5)
    assert eigenpairs(H, which="smallest").value == pytest.approx(-7)
    assert eigenpairs(H, 3, "magnitude").values == pytest.approx((-7, 5, 1))
    zero = power_iteration(Hessian(quadratic([0.0, 0.0])))
    assert (zero.value, zero.products, float(zero.vectors[0].norm())) == (0, 1, pytest.approx(1))


@pytest.mark.parametrize(("which", "expected"), [("largest", (12, 5)), ("smallest", (-7, -2)), ("magnitude", (12, -7))])
def test_lanczos_finds_each_end_with_true_residuals(which, expected):
    A = spread()
    found = eigenpairs(A, 2, which, tol=1e-5)
    assert found.converged
    assert found.products == A.products
    assert found.values == pytest.approx(expected, rel=1e-8)
    for value, v, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        (t,) = v.materialised()
        assert t.norm() == pytest.approx(1)
        assert float((A.D @ t - value * t).norm()) == pytest.approx(residual, abs=1e-9)
        assert residual <= 1e-5 * abs(value) + 1e-5
    with pytest.raises(FrozenInstanceError):
        found.products = 0


def test_eigenpairs_of_a_network_are_the_dense_ones():
    values = torch.linalg.eigvalsh(dense("Hessian", net(), data()))
    H = Hessian(problem())
    assert eigenpairs(H, 3, tol=1e-6).values == pytest.approx(values.flip(0)[:3].tolist(), rel=1e-9)
    assert eigenpairs(H, 2, "smallest", tol=1e-6).values == pytest.approx(values[:2].tolist(), rel=1e-9)
    power = power_iteration(H, tol=1e-6)
    assert power.converged
    assert power.value == pytest.approx(float(values[-1]), rel=1e-3)


def test_a_start_near_the_vector_saves_products():
    A = spread()
    cold = eigenpairs(A, tol=1e-4)
    warm = eigenpairs(A, tol=1e-4, start=cold.vectors[0])
    assert warm.products < cold.products
    assert warm.value == pytest.approx(12)


def test_repeated_eigenvalues_are_found_where_the_space_closes():
    identity = Dense(3.0 * torch.eye(5, dtype=torch.float64))
    assert eigenpairs(identity, 3).values == pytest.approx((3, 3, 3))
    assert eigenpairs(Dense(torch.zeros(4, 4)), 2).values == (0, 0)


def test_what_has_not_converged_says_so():
    with pytest.warns(NotConverged, match="not converged"):
        assert not eigenpairs(spread(), tol=1e-8, most=3).converged
    with pytest.warns(NotConverged):
        assert not power_iteration(spread(), tol=1e-8, most=3).converged
    with pytest.warns(NotConverged):
        assert not hutchinson(spread(), tol=1e-3, most=20).converged
    with pytest.warns(NotConverged):
        assert not spectral_density(spread(), steps=3, tol=1e-3).converged
    with pytest.warns(NotConverged):  # an end at 0 is not found as soon as something near 0 is
        assert not eigenpairs(Dense(spread().D @ spread().D), which="smallest", most=8).converged


@pytest.mark.parametrize("estimate", [hutchinson, hutch_pp])
def test_traces_are_within_their_standard_error(estimate):
    A = spread()
    found = [estimate(A, tol=0.05, most=4000, seed=seed) for seed in range(20)]
    assert all(one.converged and one.error <= 0.05 * abs(one.value) for one in found)
    z = torch.tensor([(one.value - float(A.D.trace())) / one.error for one in found])
    assert abs(float(z.mean())) < 3 / math.sqrt(20)
    assert 0.7 < float(z.std()) < 1.4


def test_hutchinsons_variance_is_the_closed_form():
    D = spread().D
    expected = 2 * (D.square().sum() - D.diagonal().square().sum())
    one = hutchinson(Dense(D), tol=0.05, most=3000)
    assert one.error**2 * one.products == pytest.approx(float(expected), rel=0.15)
    diagonal = hutchinson(Dense(torch.diag(torch.arange(5.0))))
    assert (diagonal.value, diagonal.error, diagonal.products) == (10.0, 0.0, 8)


def test_hutch_pp_is_exact_where_the_sketch_holds_all():
    A = Dense(torch.diag(torch.cat([torch.tensor([9.0, 4.0, -1.0]), torch.zeros(30)])).double())
    found = hutch_pp(A, rank=5)
    assert found.value == pytest.approx(12)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.products == 5 + 3 + 8
    assert A.products == found.products
    low = spread()
    assert hutch_pp(low, rank=10, tol=0.03, most=10**4).products < hutchinson(low, tol=0.03, most=10**5).products / 2


def test_the_density_has_the_matrix_moments():
    A = spread()
    found = spectral_density(A, probes=200, steps=12)
    for power in (1, 2, 3):
        each = torch.stack([w @ x**power for x, w in zip(found.nodes, found.weights, strict=True)])
        exact = float(torch.linalg.matrix_power(A.D, power).trace()) / 40
        assert abs(float(each.mean()) - exact) < 3.5 * float(each.std()) / math.sqrt(200)
    assert [float(w.sum()) for w in found.weights] == pytest.approx([1] * 200)
    grid = torch.linspace(-12, 17, 3000, dtype=torch.float64)
    density, _ = found.on(grid, width=0.2)
    step = float(grid[1] - grid[0])
    assert float(density.sum()) * step == pytest.approx(1, abs=1e-6)
    assert float(density[grid > 10].sum()) * step == pytest.approx(1 / 40, rel=0.3)  # the eigenvalue 12


def test_a_full_lanczos_run_has_every_eigenvalue_as_a_node():
    D = torch.diag(torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
    found = spectral_density(Dense(D), probes=1, steps=10)
    torch.testing.assert_close(found.nodes[0], torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64))
    assert found.products == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: eigenpairs(A, 0), "k must be a positive integer"),
        (lambda A: eigenpairs(A, 41), "k must be at most"),
        (lambda A: eigenpairs(A, which="top"), "which must be"),
        (lambda A: eigenpairs(A, tol=0.0), "tol must be"),
        (lambda A: power_iteration(A, most=0), "most must be"),
        (lambda A: hutchinson(A, most=4), "most must be"),
        (lambda A: hutch_pp(A, rank=10, most=20), "most must be at least"),
        (lambda A: spectral_density(A, probes=0), "probes must be"),
        (lambda A: spectral_density(A, probes=1).on(torch.zeros(2), 0.0), "width must be"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(spread())


def test_products_that_are_not_finite_stop_the_estimate():
    broken = Dense(torch.full((3, 3), math.nan))
    for estimate in (eigenpairs, hutchinson, spectral_density):
        with pytest.raises(FloatingPointError, match="not finite"):
            estimate(broken)
