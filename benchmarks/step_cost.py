"""Measure what a method's own algebra costs: its step without its passes and without the base optimizer's step.

The closure only writes gradients computed before. From the time of a step that of as many closures and of one base step
is taken off, all three measured in the same interleaved rounds. Peak memory is in copies of the parameters, the
gradient itself being one.

``python -m benchmarks.step_cost --shapes resnet18 vit_s --threads 1 --out benchmarks/records/step_cost_cpu.json``
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from benchmarks import record
from benchmarks.memory import peak
from benchmarks.models import CASES
from benchmarks.rivals import NAME, RIVALS
from benchmarks.timing import Timer
from steppe.lab.models import mlp

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": CASES["resnet18"].model,
    "vit_s": CASES["vit_s"].model,
    "mlp_100m": lambda: mlp([5000] * 5),
    "digits_mlp": CASES["digits_mlp"].model,
}
LR = 1e-6
SAMPLE = 0.02  # seconds that a sample lasts at least
EXAMPLES = 16
PERIOD = {"LookSAM": 10}  # steps until every kind of step has come
READING = (steppe.MomentumSAM, steppe.PreconditionedSAM)  # the base's moments


class Fake(steppe.Batch):
    """A batch whose passes cost nothing: losses are constants, gradients are copies of two sets in turn."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(nn.Module(), lambda model, data: data, torch.zeros(EXAMPLES))
        self.parameters = parameters
        self.sets = itertools.cycle([[torch.randn_like(p) for p in parameters] for _ in range(2)])
        self.calls = 0

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for p in self.parameters:
            p.grad = None

    def losses(self) -> Tensor:
        """Return constants."""
        return torch.zeros(EXAMPLES, device=self.parameters[0].device, requires_grad=torch.is_grad_enabled()) + 0

    def backward(self, *_: Any) -> None:
        """Make fresh gradients, as autograd does."""
        self.calls += 1
        for p, g in zip(self.parameters, next(self.sets), strict=True):
            p.grad = g.clone() if p.requires_grad else None

    def subset(self, on: Tensor) -> Fake:
        """Return the batch itself."""
        return self


class Method:
    """A method's step on fake passes, with its samples."""

    def __init__(self, name: str, by: str, step: Callable[[Fake], object], fake: Fake, device: torch.device) -> None:
        self.name, self.by, self.fake, self.device = name, by, fake, device
        self.period = PERIOD.get(name, 1)
        self.timer = Timer(lambda: step(fake), device, repeats=self.period)
        self.overheads: list[float] = []
        for _ in range(2):
            self.timer.once()
        self.timer.repeats *= max(1, min(200, round(SAMPLE / (self.period * self.timer.once()))))
        before = fake.calls
        self.bytes = max(peak(lambda: step(fake), device) for _ in range(self.period))
        self.passes = (fake.calls - before) / self.period

    def sample(self, closure: Timer, base: Timer) -> None:
        """Take the time of one step less that of its closures and of a base step, measured around it."""
        beside = base.once() + self.passes * closure.once()
        self.overheads.append(self.timer.once() - beside)

    def row(self, copy: int, base: float) -> dict[str, Any]:
        """Return the milliseconds of the method's own algebra, with their range, and peak memory in copies."""
        ms = [1e3 * seconds for seconds in self.overheads]
        return {
            "method": self.name,
            "by": self.by,
            "ms": round(median(ms), 4),
            "low": round(min(ms), 4),
            "high": round(max(ms), 4),
            "rounds": len(ms),
            "passes": self.passes,
            "base_steps": round(median(ms) / (1e3 * base), 3),
            "copies": round(self.bytes / copy, 3),
        }


def ours(method: type[steppe.SharpnessAware], parameters: list[Tensor], fake: Fake) -> Callable[[Fake], object]:
    """Return the step of one of steppe's methods."""
    options = {"full": fake} if method is steppe.NSAM else {}
    base = torch.optim.SGD(parameters, lr=LR)
    if method in READING:
        keep_moments(parameters, base)
    return method(base, **options).step


def keep_moments(parameters: list[Tensor], base: torch.optim.Optimizer) -> None:
    """Put constant moments into the state of a base that keeps none."""
    for p in parameters:
        base.state[p] |= {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}


def methods(parameters: list[Tensor], fake: Fake, names: list[str]) -> list[Method]:
    """Return every method of steppe, each beside its rival."""
    device, made = parameters[0].device, []
    for method in steppe.METHODS:
        name = method.__name__
        if (names and name not in names) or method is steppe.FunctionalSAM:  # whose passes need a model
            continue
        made.append(Method(name, "steppe", ours(method, parameters, fake), fake, device))
        if NAME and name in RIVALS:
            made.append(Method(name, NAME, RIVALS[name](parameters, LR), fake, device))
    return made


def measure(model: nn.Module, rounds: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the rows of one model's shapes."""
    parameters = list(model.parameters())
    device, fake = parameters[0].device, Fake(parameters)
    base = torch.optim.SGD(parameters, lr=LR)
    fake()
    timers = Timer(fake, device), Timer(base.step, device)  # the base uses the gradients left
    for timer in timers:
        timer.prepare(1, 1.0, SAMPLE)
    gradients = [p.grad for p in parameters]
    norm = Timer(lambda: torch._foreach_norm(gradients), device)
    norm.prepare(1, 1.0, SAMPLE)
    contenders = methods(parameters, fake, names or [])
    steps: list[float] = []
    norms: list[float] = []
    for _ in range(rounds):
        for contender in contenders:
            fake()
            contender.sample(*timers)
        fake()
        steps.append(timers[1].once())
        norms.append(norm.once())
    copy = sum(p.numel() * p.element_size() for p in parameters)
    about = {"tensors": len(parameters), "parameters": sum(p.numel() for p in parameters)}
    about |= {"norm_ms": round(1e3 * median(norms), 4)}
    return [about | contender.row(copy, median(steps)) for contender in contenders]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["resnet18", "vit_s"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--note", default="", help="what else the record should say")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure and write the record."""
    record.steady_memory()
    args = arguments()
    torch.set_num_threads(args.threads)
    if NAME is None:
        print("pytorch_optimizer is not installed, so there is no comparison: pip install --no-deps pytorch-optimizer")
    settings = {"device": args.device, "rounds": args.rounds, "other": NAME, "note": args.note}
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        found = measure(SHAPES[shape]().to(args.device), args.rounds)
        for row in found:
            print(shape, *row.values(), flush=True)
        rows += [{"shapes": shape} | row for row in found]
        if args.out:
            record.write(args.out, "step_cost", torch.device(args.device), settings, rows)


if __name__ == "__main__":
    main()
