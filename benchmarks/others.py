"""What other implementations of SAM do in four situations.

``python -m benchmarks.others NAME=WHERE:CLASS ... --out docs/records/other_implementations.json``

``sam.py`` of davda54/sam and Composer's ``SAMOptimizer`` are files, loaded by their path; an installed package is
named by its module, ``pytorch_optimizer=pytorch_optimizer:SAM``. Steppe itself and optax, where it is installed, are
tried too. The record holds true, false, or an error's text.
"""

import argparse
import copy
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steppe

Made = Callable[..., torch.optim.Optimizer]


class Branches(nn.Module):
    """A model whose second branch takes part in every other pass, as with stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.passes = nn.Linear(8, 4), nn.Linear(8, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the branches that take part."""
        self.passes += 1
        return self.a(x) + (self.b(x) if self.passes % 2 else 0)


def steps(model: nn.Module, optimizer: Any, count: int, before: Callable[[], None] = lambda: None) -> None:
    """Take steps of a closure on fixed random data; ``before`` runs first, each time."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(16, 8, generator=draw)

        def closure(**_: Any) -> Tensor:
            for p in model.parameters():
                p.grad = None
            loss = model(x).square().mean()  # noqa: B023
            loss.backward()
            return loss

        before()
        if optimizer.needs_gradients:
            closure()
        optimizer.step(closure)


def small() -> nn.Module:
    """Return the model of the other checks, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def flat(model: nn.Module) -> Tensor:
    """Return a copy of all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def comes_back(make: Made) -> bool:
    """With a learning rate of 0 the weights are what they were, bit for bit."""
    model = small()
    before, optimizer = flat(model), make(model, lr=0.0)
    steps(model, optimizer, 50)
    return torch.equal(before, flat(model))


def comes_back_without_gradient(make: Made) -> bool:
    """The same where a parameter has a gradient in the first pass alone."""
    model = Branches()
    optimizer, before = make(model, lr=0.0), flat(model)
    steps(model, optimizer, 1, before=lambda: setattr(model, "passes", 0))
    return torch.allclose(before, flat(model), atol=1e-6)


def resumes(make: Made) -> bool:
    """A run goes on from the optimizer's one ``state_dict`` as if nothing had stopped it."""
    model = small()
    optimizer = make(model, lr=0.1)
    steps(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 5)
    again = small()
    optimizer = make(again, lr=0.1)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    steps(again, optimizer, 5)
    return torch.equal(flat(model), flat(again))


def needs_nothing_before(make: Made) -> bool:
    """``step(closure)`` does the same whatever gradients are there before."""
    ends = []
    for value in (None, 100.0):
        model = small()
        optimizer = make(model, lr=0.1)
        optimizer.needs_gradients = False

        def leave(model: nn.Module = model, value: float | None = value) -> None:
            for p in model.parameters():
                p.grad = None if value is None else torch.full_like(p, value)

        steps(model, optimizer, 1, leave)
        ends.append(flat(model))
    return torch.equal(*ends)


CHECKS = (comes_back, comes_back_without_gradient, resumes, needs_nothing_before)


def tried(make: Made) -> Iterator[tuple[str, bool | str]]:
    """Yield what every check found; an error counts as its text."""
    for check in CHECKS:
        try:
            yield check.__name__, check(make)
        except Exception as error:  # whatever another package raises is the answer
            yield check.__name__, f"{type(error).__name__}: {error}"[:120]


def ours(model: nn.Module, lr: float) -> Any:
    """Return steppe's SAM, made as the others are."""
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), rho=0.05)
    optimizer.needs_gradients = False
    return optimizer


def theirs(where: str) -> Made:
    """Return a maker of the class ``FILE:CLASS`` or ``module:CLASS``, whichever way it takes its base."""
    place, _, name = where.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    kind = getattr(module, name)

    def make(model: nn.Module, lr: float) -> Any:
        options = {"lr": lr, "momentum": 0.9}
        try:
            optimizer = kind(list(model.parameters()), torch.optim.SGD, rho=0.05, **options)
        except (TypeError, AttributeError):
            optimizer = kind(torch.optim.SGD(model.parameters(), **options), rho=0.05)
        optimizer.needs_gradients = name != "SAMOptimizer"  # Composer's runs the first pass itself
        return optimizer

    return make


def optax() -> dict[str, bool]:
    """Return what optax's SAM does, in both its modes."""
    import jax
    import optax as library

    w = jax.random.normal(jax.random.key(0), (1000,))
    found = {}
    for opaque in (False, True):
        ascent = library.chain(library.contrib.normalize(), library.sgd(0.05))
        sam = library.contrib.sam(library.sgd(0.0), ascent, sync_period=2, opaque_mode=opaque)
        slope = jax.grad(lambda w, _=0: (w**2).mean())
        now, state = w, sam.init(w)
        for _ in range(50):
            more = {"grad_fn": slope} if opaque else {}
            change, state = sam.update(slope(now), state, now, **more)
            now = library.apply_updates(now, change)
        found[f"comes_back, opaque_mode={opaque}"] = bool((now == w).all())
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("others", nargs="*", metavar="NAME=WHERE:CLASS")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    makers = {"steppe": ours} | {name: theirs(where) for name, where in (one.split("=") for one in asked.others)}
    found: dict[str, Any] = {name: dict(tried(make)) for name, make in makers.items()}
    if importlib.util.find_spec("optax"):
        found["optax"] = optax()
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if asked.out:
        asked.out.write_text(text)
