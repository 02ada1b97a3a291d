"""Run the optimizers of other packages as bases: ``python tools/base_optimizers.py``.

For every optimizer class of torch, pytorch_optimizer, bitsandbytes, schedulefree and prodigyopt that is installed:

- does ``steppe.SAM(base, rho=0)`` give the weights of the base alone, bit for bit;
- does a run of the base alone resume from a checkpoint bit for bit, and does steppe's (with F-SAM, which has memory)?

It prints the table, and writes what differs to ``docs/records/base_optimizers.json``.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

import steppe

RECORD = Path(__file__).parents[1] / "docs" / "records" / "base_optimizers.json"
STEPS, BREAK = 8, 4
PACKAGES = {"torch": "torch.optim", "pytorch_optimizer": "pytorch_optimizer", "bitsandbytes": "bitsandbytes.optim"}
PACKAGES |= {"schedulefree": "schedulefree", "prodigyopt": "prodigyopt"}
LEFT_OUT = {  # what is no base: a closure runs inside, other methods of sharpness, the model's backward, a helper
    *("LBFGS", "SparseAdam", "BSAM", "SAM", "GSAM", "WSAM", "LookSAM", "FriendlySAM", "PCGrad", "SafeFP16Optimizer"),
    *("LOMO", "AdaLOMO", "DistributedMuon", "GlobalOptimManager", "Optimizer", "AdamWScheduleFreeClosure"),
    *("RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"),
}

Make = Callable[[nn.Module], Optimizer]


def model() -> nn.Module:
    """Return the model of every run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.LayerNorm(64), nn.Linear(64, 8))


def made(kind: type[Optimizer]) -> Make:
    """Return what makes an optimizer of a class for a model."""
    names = list(inspect.signature(kind.__init__).parameters)
    given: dict[str, Any] = {}
    if "num_iterations" in names:
        given["num_iterations"] = 20
    if "min_8bit_size" in names:
        given["min_8bit_size"] = 16
    if inspect.signature(kind.__init__).parameters.get("lr") and kind.__init__.__module__.startswith("bitsandbytes"):
        given["lr"] = 1e-2
    if kind.__name__ in ("SGD", "SGD8bit", "SGD32bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS"):
        given["momentum"] = 0.9
    if "optimizer" in names[1:3] or "base" in names[1:2]:
        return lambda net: kind(torch.optim.AdamW(net.parameters(), lr=1e-2), **given)
    if names[1:2] == ["model"]:
        return lambda net: kind(net, **given)
    if "Muon" in kind.__name__ and kind.__module__.startswith("torch."):
        return lambda net: steppe.Joint(
            [
                kind([p for p in net.parameters() if p.ndim == 2]),
                torch.optim.SGD([p for p in net.parameters() if p.ndim != 2], 0.1),
            ]
        )
    if "use_muon" in (inspect.getsource(kind) if kind.__module__.startswith("pytorch_optimizer") else ""):
        return lambda net: kind(
            [
                {"params": [p for p in net.parameters() if p.ndim == 2], "use_muon": True},
                {"params": [p for p in net.parameters() if p.ndim != 2], "use_muon": False},
            ],
            **given,
        )
    return lambda net: kind(net.parameters(), **given)


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Train on batches, with random numbers, that depend on the step alone."""
    for step in steps:
        torch.manual_seed(step)
        np.random.seed(step)
        x, y = torch.randn(16, 16), torch.randint(8, (16,))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        if isinstance(optimizer, steppe.SharpnessAware):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def started(net: nn.Module, make: Callable[[nn.Module], Optimizer]) -> Optimizer:
    """Return an optimizer in training mode."""
    optimizer = make(net)
    getattr(optimizer, "train", lambda: None)()
    return optimizer


def weights(net: nn.Module) -> torch.Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def resumes(make: Callable[[nn.Module], Optimizer]) -> bool:
    """Tell whether a run that is broken off and resumed ends as one that is not."""
    net = model()
    optimizer = started(net, make)
    train(net, optimizer, range(BREAK))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(net)
    resumed = started(again, make)
    resumed.load_state_dict(torch.load(file, weights_only=False))
    train(net, optimizer, range(BREAK, STEPS))
    train(again, resumed, range(BREAK, STEPS))
    return torch.equal(weights(net), weights(again))


def tried(check: Callable[[], bool]) -> str:
    """Return ``"yes"``, ``"no"`` or the error of a check."""
    try:
        return "yes" if check() else "no"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def row(make: Make) -> dict[str, str]:
    """Return what came out for one optimizer."""

    def ends(of: Callable[[nn.Module], Optimizer]) -> torch.Tensor:
        net = model()
        train(net, started(net, of), range(STEPS))
        return weights(net)

    alone = ends(make)
    if not torch.equal(alone, ends(make)):
        return {"alone": "two runs of the base alone differ"}
    return {
        "alone": "yes",
        "rho 0 is the base": tried(lambda: torch.equal(alone, ends(lambda net: steppe.SAM(make(net), rho=0.0)))),
        "base resumes": tried(lambda: resumes(make)),
        "steppe resumes": tried(lambda: resumes(lambda net: steppe.FSAM(make(net), rho=0.05))),
    }


def classes() -> Iterator[tuple[str, type[Optimizer]]]:
    """Yield every optimizer class of the packages that are installed."""
    for package, module in PACKAGES.items():
        try:
            found = vars(importlib.import_module(module))
        except ImportError:
            continue
        for name, kind in sorted(found.items()):
            if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in LEFT_OUT:
                yield f"{package}.{name}", kind


def main() -> None:
    """Print a line an optimizer and write the record."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = {}
    for name, kind in classes():
        try:
            rows[name] = row(made(kind))
        except Exception as error:
            rows[name] = {"alone": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}
        print(name, *rows[name].values(), sep=" | ", flush=True)
    ran = {name: r for name, r in rows.items() if r["alone"] == "yes"}
    differ = {n: r for n, r in ran.items() if r["rho 0 is the base"] != "yes" or r["steppe resumes"] != "yes"}
    packages = {p: version(p) for p in PACKAGES if any(name.startswith(f"{p}.") for name in rows)}
    record = {
        "classes": len(rows),
        "steps": STEPS,
        "packages": packages,
        "python": platform.python_version(),
        "ran": {p: ", ".join(n.split(".")[1] for n in ran if n.startswith(f"{p}.")) for p in packages},
        "steppe resumes where the base does not": sorted(
            n for n, r in ran.items() if r["base resumes"] != "yes" and r["steppe resumes"] == "yes"
        ),
        "differ": differ,
        "do not run alone on this model": {n: r["alone"] for n, r in rows.items() if r["alone"] != "yes"},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(rows)} classes, {len(ran)} ran; different: {sorted(differ)}")


if __name__ == "__main__":
    main()
