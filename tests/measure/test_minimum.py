import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from steppe.measure import WorstCase, minimum

from .models import CRITERION, batches, data, dense, losses, net


def test_the_row_of_a_minimum():
    model, xy = net(), data()
    row = minimum(model, CRITERION, batches(xy, 5, 16, 2), sharpness=WorstCase(0.1, m=8))
    H, V = dense("Hessian", model, xy), dense("GradientCovariance", model, xy)
    assert row.n == 23
    assert row.loss == pytest.approx(losses(model, xy).mean().item())
    assert row.error == pytest.approx(float((model(xy[0]).argmax(1) != xy[1]).double().mean()))
    assert row.top == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)
    assert abs(row.trace - float(H.trace())) < 3.5 * row.trace_error
    assert row.trace_V == pytest.approx(float(V.trace()))
    assert row.sharpness > 0
    assert eval(row.measure) == WorstCase(0.1, m=8)
    assert row.converged
    json.dumps(dataclasses.asdict(row), allow_nan=False)


def test_a_loss_without_classes_has_no_error():
    torch.manual_seed(0)
    model, (x, _) = nn.Linear(4, 2).double(), data()
    row = minimum(model, nn.MSELoss(reduction="none"), (x, x[:, :2].contiguous()))
    assert row.error is None
    with_one = torch.cat([x, torch.ones(23, 1, dtype=torch.float64)], 1)
    assert row.top == pytest.approx(float(torch.linalg.eigvalsh(with_one.T @ with_one / 23)[-1]), rel=1e-5)
    own = minimum(model, lambda model, d: model(d).square().sum(1), x)
    assert own.error is None


def test_one_subset_has_no_error_and_what_is_not_finite_is_an_error():
    model = net()
    row = minimum(model, CRITERION, data(), sharpness=WorstCase(0.1, m=None))
    assert (row.sharpness > 0, row.sharpness_error) == (True, None)
    steep = lambda model, x: 1e30 * model(x).squeeze(1)  # noqa: E731 - the square of its gradient is above float32
    with pytest.raises(FloatingPointError, match="trace_V of the minimum: not finite"):
        minimum(nn.Linear(4, 1), steep, torch.randn(4, 4))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bfloat16_model_is_measured_as_its_float32_copy(compiled):
    low, (x, y) = net(torch.bfloat16), data(dtype=torch.bfloat16)
    model = torch.compile(low, backend="aot_eager") if compiled else low
    ball = WorstCase(0.05, m=8)
    row = minimum(model, CRITERION, (x, y), sharpness=ball)
    expected = minimum(copy.deepcopy(low).float(), CRITERION, (x.float(), y), sharpness=ball)
    assert dataclasses.astuple(row)[:-3] == pytest.approx(dataclasses.astuple(expected)[:-3], rel=1e-4)
