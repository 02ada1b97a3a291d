"""The largest Hessian eigenvalue of an 11 M-parameter ResNet-18 on 1,000 real images: how long, how exact?

``python -m benchmarks.top_eigenvalue --out benchmarks/records/top_eigenvalue_cpu.json`` trains for a moment on the
first 1,000 images of Fashion-MNIST, finds the top eigenvector on the first 250 of them, starts Lanczos on all 1,000
from it, and goes on until the residual is far below what is asked: each estimate on the way is compared with the last.
Seconds are the wall's and the processor's (all threads together); on an idle machine the wall's are the latter over
the threads, about.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from benchmarks import record
from benchmarks.models import resnet18
from steppe.engine.vector import Vector
from steppe.lab import data
from steppe.lab.data import idx
from steppe.measure import Hessian, Problem, eigenpairs
from steppe.measure.krylov import lanczos


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images, standardised, as three equal channels."""
    x, y = idx.read_pair(data.FASHION_MNIST, "train")
    x = x[:count].float()
    return ((x - x.mean()) / x.std()).unsqueeze(1).expand(-1, 3, -1, -1).contiguous(), y[:count].long()


def trained(width: int, data: tuple[torch.Tensor, torch.Tensor], steps: int) -> nn.Module:
    """A ResNet-18 after some steps of SGD with momentum at batch 64."""
    torch.manual_seed(0)
    model = resnet18(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        optimizer.step()
    return model


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def row(self, phase: str, products: int, value: float, residual: float) -> dict[str, float | str | int]:
        """An estimate and when it was there."""
        found = {"phase": phase, "products": products, "value": value, "residual": residual}
        now = {"wall_s": time.perf_counter() - self.wall, "processor_s": time.process_time() - self.processor}
        return found | {key: round(seconds, 1) for key, seconds in now.items()}


def estimates(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], part: int, products: int) -> list[dict]:
    """Every estimate of the top eigenvalue, on a part of the data first."""
    criterion, clock = nn.CrossEntropyLoss(reduction="none"), Clock()
    few = eigenpairs(Hessian(Problem(model, criterion, tuple(t[:part] for t in data), batch_size=100)), tol=0.05)
    rows = [clock.row(f"{part} images", few.products, few.value, few.residuals[0])]
    print(rows[-1], flush=True)
    H = Hessian(Problem(model, criterion, data, batch_size=100))
    start: Vector = few.vectors[0]
    for space in islice(lanczos(H, start, torch.Generator().manual_seed(0)), products):
        values, _, residuals = space.ritz()
        rows.append(clock.row(f"{len(data[0])} images", len(space.alpha), float(values[-1]), float(residuals[-1])))
        print(rows[-1], flush=True)
    last = rows[-1]["value"]
    return [row | {"off_by": round(abs(row["value"] / last - 1), 6)} for row in rows]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--part", type=int, default=250)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--products", type=int, default=8)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    data = images(options.images)
    model = trained(options.width, data, options.steps)
    rows = estimates(model, data, options.part, options.products)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    settings |= {"parameters": sum(p.numel() for p in model.parameters()), "precision": "float32"}
    record.write(options.out, "top_eigenvalue", torch.device("cpu"), settings, rows)


if __name__ == "__main__":
    main()
