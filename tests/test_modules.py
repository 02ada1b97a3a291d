"""The model of a plain closure is found among the variables that the closure refers to."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import steppe
from steppe.engine.modules import modules_behind, referred

NET = nn.Linear(3, 2)


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.steps = model, 0

    def loss(self) -> torch.Tensor:
        return self.model(torch.ones(1, 3)).sum()


class Callable:
    def __call__(self) -> torch.Tensor:
        return HELD[0](torch.ones(1, 3))


class Slotted:
    __slots__ = ("inner",)

    def call(self) -> torch.Tensor:
        return HELD[0](torch.ones(1, 3))


HELD: list[nn.Module] = []


def closures(model: nn.Module):
    HELD[:], many = [model], [object() for _ in range(500)] + [model]
    slotted = Slotted()
    slotted.inner = model
    trainer, box, held = Trainer(model), [model], SimpleNamespace(inner=SimpleNamespace(net=model))
    compiled = torch.compile(lambda: model(torch.ones(1, 3)), backend="eager")
    return {
        "cell": lambda: model(torch.ones(1, 3)),
        "default": lambda m=model: m(torch.ones(1, 3)),
        "bound method": trainer.loss,
        "attribute": lambda: trainer.loss(),
        "attribute of an attribute": lambda: held.inner.net(torch.ones(1, 3)),
        "partial": partial(lambda m: m(torch.ones(1, 3)), model),
        "container": lambda: box[0](torch.ones(1, 3)),
        "forward": lambda f=model.forward: f(torch.ones(1, 3)),
        "compiled function": lambda: compiled(),
        "global of a callable object": Callable(),
        "global of a method": lambda: slotted.call(),
        "slot": lambda: slotted,
        "one of many": lambda: many[-1](torch.ones(1, 3)),
        "inside a comprehension": lambda: [model(x) for x in torch.ones(2, 3)],
    }


@pytest.mark.parametrize("how", list(closures(NET)))
def test_the_model_is_found(how: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    assert referred(closures(model)[how], list(model.parameters())) == [model]


def test_a_global_model_is_found() -> None:
    assert referred(lambda: NET(torch.ones(1, 3)), list(NET.parameters())) == [NET]


def test_the_outermost_module_with_the_parameters_is_found() -> None:
    inner, other = nn.Linear(3, 2), nn.Linear(3, 2)
    outer = nn.Sequential(inner)
    found = referred(lambda: (inner, outer, other), list(inner.parameters()))
    assert found == [outer]


def test_large_containers_and_empty_cells_are_passed_over() -> None:
    data = [torch.ones(1)] * 1001 + [NET]

    def closure():
        return data, later

    assert referred(closure, list(NET.parameters())) == []
    later = NET
    assert referred(closure, list(NET.parameters())) == [NET]


class Hostile(dict):
    """What a search must not wake: a proxy, a lazy container, a property."""

    def __getattribute__(self, name: str):
        raise RuntimeError(f"{name} was asked for")

    def __getitem__(self, key):
        raise RuntimeError("loaded")

    def values(self):
        raise RuntimeError("loaded")

    def __len__(self) -> int:
        raise RuntimeError("counted")


def test_nothing_that_the_search_passes_runs_code_of_its_own() -> None:
    hostile = Hostile(data=1)
    assert referred(lambda: (hostile, NET), list(NET.parameters())) == [NET]


def test_a_named_model_is_not_searched_for_and_follows_a_copy() -> None:
    model = nn.Linear(3, 2)
    assert list(modules_behind(lambda: None, list(model.parameters()), model)()) == [model]
    other, copied = copy.deepcopy((model, steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)))
    assert copied._stepper.model is other
    with pytest.raises(TypeError, match=r"torch\.nn.Module or None, got int"):
        steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=3)


def test_a_model_that_changes_behind_the_same_closure_is_found() -> None:
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    trainer = Trainer(a)
    for model in (a, b):
        trainer.model = model
        assert list(modules_behind(trainer.loss, list(model.parameters()))()) == [model]


def test_a_search_that_finds_nothing_ends() -> None:
    grid = [[object() for _ in range(900)] for _ in range(900)]
    deep: object = NET
    for _ in range(9):
        deep = [deep]
    assert referred(lambda: (grid, deep), list(NET.parameters())) == []
