import pytest
import torch
from torch import nn

from steppe.measure import Hessian, Problem, eigenpairs, filter_normalised, line, plane, plot, towards

from .models import net, problem, quadratic


def test_filters_have_the_norms_of_the_models_and_biases_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 3))

    whole = Problem(model, nn.CrossEntropyLoss(reduction="none"), (torch.randn(2, 1, 3, 3), torch.tensor([0, 1])))
    d = filter_normalised(whole)
    for t, p in zip(d.tensors, whole.parameters, strict=True):
        if p.dim() < 2:
            assert t is None
        else:
            torch.testing.assert_close(t.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
    assert not torch.equal(d.tensors[0], filter_normalised(whole, seed=1).tensors[0])


def test_a_line_through_a_quadratic_is_a_parabola():
    whole = quadratic([5.0, 2.0, 0.5])
    v = eigenpairs(Hessian(whole)).vectors[0]
    found = line(whole, v, [-2.0, 0.0, 1.0])
    assert found.loss == pytest.approx((10.0, 0.0, 2.5), abs=1e-9)


def test_the_plane_of_the_top_two_eigenvectors():
    whole = quadratic([5.0, 2.0, 0.5])
    found = plane(whole, *eigenpairs(Hessian(whole), k=2).vectors, x=[0.0, 1.0, 2.0], y=[0.0, 1.0])
    assert found.loss[0] == pytest.approx((0.0, 2.5, 10.0), abs=1e-9)
    assert found.loss[1] == pytest.approx((1.0, 3.5, 11.0), abs=1e-9)


def test_between_two_minima_the_ends_are_theirs():
    here, there = net(), net()
    with torch.no_grad():
        for p in there.parameters():
            p.add_(torch.randn_like(p))
    for other in (there, there.state_dict()):
        found = line(problem(here), towards(problem(here), other), [0.0, 1.0])
        assert found.loss[0] == pytest.approx(float(problem(here).losses().mean()))
        assert found.loss[1] == pytest.approx(float(problem(there).losses().mean()))
    with pytest.raises(ValueError, match=r"0\.weight is missing or of another shape"):
        towards(problem(here), nn.Linear(2, 2))


def test_pictures_are_written_also_of_losses_that_are_not_finite(tmp_path):
    whole = quadratic([5.0, 2.0])
    v = eigenpairs(Hessian(whole), k=2).vectors
    steps = [-1.0, 0.0, 1e200]
    surface = plane(whole, *v, steps, steps)
    assert surface.loss[1][1] == pytest.approx(0)
    assert surface.loss[2][2] == float("inf")
    for name, what in (
        ("lines", {"one": line(whole, v[0], steps), "two": line(whole, v[1], steps)}),
        ("plane", surface),
    ):
        plot.png(what, tmp_path / f"{name}.png", x="along v")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
