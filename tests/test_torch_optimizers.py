"""Every optimizer of torch with every set of its options, as torch's own table lists them, as a base."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steppe
from tests.cases import same_bits

pytest.importorskip("expecttest")  # which torch's own tests need
table = pytest.importorskip("torch.testing._internal.common_optimizers")

INFOS = [info for info in table.optim_db if info.optim_cls.__name__ not in ("LBFGS", "SparseAdam")]
ROWS = [
    pytest.param(info, each.kwargs, id=f"{info.optim_cls.__name__}-{each.desc}")
    for info in INFOS
    for each in info.optim_inputs_func(device="cpu")
]


def refused(options: dict[str, Any]) -> bool:
    return bool(options.get("maximize") or options.get("differentiable"))


each_row = pytest.mark.parametrize(("info", "options"), [row for row in ROWS if not refused(row.values[1])])


def layers() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 10)), nn.Parameter(torch.randn(10, 4))]  # Muon takes matrices alone


def base(info: Any, parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = info.optim_cls(parameters, **copy.deepcopy(options))
    return made


def loss_of(parameters: list[nn.Parameter], step: int) -> Tensor:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    return (torch.tanh(x @ parameters[0]) @ parameters[1]).square().mean()


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for k in steps:

        def closure(k: int = k) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(parameters, k)
            loss.backward()
            return loss

        optimizer.step(closure)


@each_row
def test_radius_zero_is_the_base_alone(info: Any, options: dict[str, Any]) -> None:
    ours, theirs = layers(), layers()
    opt, plain = steppe.SAM(base(info, ours, options), rho=0.0), base(info, theirs, options)
    run(opt, ours, range(4))
    run(plain, theirs, range(4))
    assert same_bits(ours, theirs)


@pytest.mark.parametrize(("info", "options"), [row for row in ROWS if refused(row.values[1])])
def test_options_that_no_step_could_use_are_refused(info: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(maximize|differentiable) must be False"):
        steppe.SAM(base(info, layers(), options))


@each_row
def test_it_resumes_and_copies(info: Any, options: dict[str, Any]) -> None:
    ours = layers()
    opt = steppe.FSAM(base(info, ours, options), rho=0.1)
    run(opt, ours, range(3))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    theirs, (copied, other) = copy.deepcopy(ours), copy.deepcopy((ours, opt))
    resumed = steppe.FSAM(base(info, theirs, options), rho=0.2)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for o, p in ((opt, ours), (resumed, theirs), (other, copied)):
        run(o, p, range(3, 5))
    assert same_bits(ours, theirs)
    assert same_bits(ours, copied)


@each_row
def test_checkpoints_without_newer_options_load(info: Any, options: dict[str, Any]) -> None:
    """As of older releases of torch."""
    ours = layers()
    opt = steppe.SAM(base(info, ours, options), rho=0.1)
    run(opt, ours, range(2))
    old = copy.deepcopy(opt.state_dict())
    for group in old["param_groups"]:
        for name in ("foreach", "fused"):
            group.pop(name, None)
    opt.load_state_dict(old)
    run(opt, ours, range(2, 3))
    assert all(p.isfinite().all() for p in ours)


@each_row
def test_a_step_without_gradients_moves_nothing(info: Any, options: dict[str, Any]) -> None:
    ours = layers()
    before, unused = [p.detach().clone() for p in ours], nn.Parameter(torch.ones(2, 2))
    opt = steppe.FSAM(base(info, ours, options))
    state = {p: set(entries) for p, entries in opt.state.items()}

    def closure() -> Tensor:
        loss = unused.sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="no parameter received a gradient"):
        opt.step(closure)
    assert same_bits(before, ours)
    assert {p: set(entries) for p, entries in opt.state.items()} == state


ERRORS = [
    pytest.param(info, each, id=f"{info.optim_cls.__name__}-{each.error_regex[:40]}")
    for info in INFOS
    for each in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    if each.error_on is table.OptimizerErrorEnum.CONSTRUCTION_ERROR and not issubclass(each.error_type, Warning)
]


@pytest.mark.parametrize(("info", "error"), ERRORS)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_errors_of_the_base_come_through(info: Any, error: Any) -> None:
    given = error.optimizer_error_input
    with pytest.raises(error.error_type, match=error.error_regex):
        steppe.SAM(info.optim_cls(given.params, **given.kwargs))
