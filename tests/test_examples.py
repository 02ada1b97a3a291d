"""The examples of the docstrings run: each in the names of its module, with a model, data and a base beside them."""

import doctest
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn

import steppe
from steppe import measure, sde

APART = ("cli", "lab", "integrations", "__main__")  # these need packages, files or processes


def examples() -> list[doctest.DocTest]:
    """Return the docstrings of the package that have an example."""
    found = {}
    for module in pkgutil.walk_packages(steppe.__path__, "steppe."):
        if module.name.split(".")[1] not in APART:
            imported = importlib.import_module(module.name)
            found |= {test.name: test for test in doctest.DocTestFinder().find(imported, module.name) if test.examples}
    return list(found.values())


def common() -> dict[str, Any]:
    """Return the names that examples use without making them."""
    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss(reduction="none")
    inputs, targets = torch.randn(16, 4), torch.randint(3, (16,))
    data = [(inputs[:8], targets[:8]), (inputs[8:], targets[8:])]
    problem = measure.Problem(model, criterion, data)

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = criterion(model(inputs), targets).mean()
        loss.backward()
        return loss

    made = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    return {
        "torch": torch,
        "nn": nn,
        "steppe": steppe,
        "measure": measure,
        "model": model,
        "criterion": criterion,
        "inputs": inputs,
        "targets": targets,
        "images": inputs,
        "labels": targets,
        "loader": data,
        "epochs": 5,
        "batch": steppe.Batch.supervised(model, criterion, inputs, targets),
        "four_batches": 2 * data,
        "problem": problem,
        "other_model": model,
        "d": measure.filter_normalised(problem),
        "t": [-1.0, 0.0, 1.0],
        "x": [-0.1, 0.1],
        "y": [-0.1, 0.1],
        "closure": closure,
        "optimizer": made,
        **{name: getattr(steppe, name) for name in steppe.__all__},
        **{name: getattr(measure, name) for name in measure.__all__},
    }


class Bases(dict[str, Any]):
    """Names in which every ``base`` is a new optimizer: one may be wrapped once."""

    def __missing__(self, name: str) -> Any:
        if name == "base":
            return torch.optim.SGD(self["model"].parameters(), lr=0.1, momentum=0.9)
        raise KeyError(name)


def of_its_own(name: str) -> dict[str, Any]:
    """Return what one example means by names that mean something else in the others."""
    if name == "steppe.optimizer.SharpnessAware.first_step":
        return {"x": torch.randn(8, 4), "y": torch.randint(3, (8,)), "criterion": nn.CrossEntropyLoss()}
    if name == "steppe.batch.Batch":
        normal = nn.Linear(4, 1)
        made = type(
            "Normal",
            (nn.Module,),
            {"forward": lambda self, x: torch.distributions.Normal(self.mean(x).squeeze(1), 1.0)},
        )()
        made.mean = normal
        optimizer = steppe.SAM(torch.optim.SGD(normal.parameters(), lr=0.1))
        return {"model": made, "x": torch.randn(8, 4), "y": torch.randn(8), "optimizer": optimizer}
    if name == "steppe.mean_batch.MeanBatch":
        linear = nn.Linear(4, 3)

        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = linear

            def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
                loss = nn.functional.cross_entropy(self.linear(x), labels)
                return type("Output", (), {"loss": loss})

        inputs = {"x": torch.randn(8, 4), "labels": torch.randint(3, (8,))}
        return {"model": Tokens(), "inputs": inputs}
    if name == "steppe.engine.functional.functional":
        linear = nn.Linear(4, 3, bias=False)
        return {"batch": steppe.Batch.supervised(linear, nn.CrossEntropyLoss(reduction="none"), *common()["loader"][0])}
    if name.startswith("steppe.sde.") and "problem_of" not in name and "regularisers" not in name:
        problem = sde.logistic(torch.randn(6, 2).double(), torch.tensor([1.0, -1.0] * 3).double())
        scheme = sde.Scheme(steppe.Rule(geometry=steppe.Unnormalised()), lr=0.1, rho=0.05, size=2)
        names = {name: getattr(sde, name) for name in sde.__all__}
        start = torch.zeros(2, dtype=torch.float64)
        own = {"problem": problem, "scheme": scheme, "equation": sde.Equation(problem, scheme), "x0": start}
        return names | own | {"x": start, "generator": torch.Generator().manual_seed(0)}
    return {name: getattr(sde, name) for name in sde.__all__} if name.startswith("steppe.sde.") else {}


@pytest.mark.filterwarnings("ignore::steppe.measure.NotConverged")  # of an untrained network
@pytest.mark.parametrize("example", examples(), ids=lambda test: test.name)
def test_the_example_runs(example: doctest.DocTest, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = Bases({**common(), **example.globs, **of_its_own(example.name)})
    exec("\n".join(part.source.rstrip() for part in example.examples), names)
