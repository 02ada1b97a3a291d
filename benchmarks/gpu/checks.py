"""Checks on a device: the same step as on the CPU, replayed random numbers, loss scaling, no waiting, graphs."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import steppe
from benchmarks.gpu.jobs import Job, Result, Setting

N, STEPS = 16, 3
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "serial": {"m": 4, "parallel": False},
    "shared": {"m": 4},
    "sampled": {"m": 4, "sampled": 2},
}
BOUND = {torch.float64: 1e-9, torch.float32: 2e-3}  # of weights after some steps; a GPU sums in another order


class Net(nn.Module):
    """A convolution, group norm, attention over pixels, and a linear layer: what most models are made of."""

    def __init__(self, norm: str = "group", dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 16) if norm == "group" else nn.BatchNorm2d(16)
        self.mix = nn.Linear(16, 48)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = F.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(self.dropout(F.scaled_dot_product_attention(q, k, v).mean(1)))


def losses(model: nn.Module, data: Any) -> Tensor:
    """Cross-entropy of every example, in float32 or wider."""
    out = model(data[0])
    return F.cross_entropy(out if out.dtype == torch.float64 else out.float(), data[1], reduction="none")


def made(device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, Any]:
    """Return the same network and data on any device."""
    torch.manual_seed(0)
    model, x, y = Net(**options).to(dtype), torch.randn(N, 3, 12, 12, dtype=dtype), torch.randint(10, (N,))
    return model.to(device), (x.to(device), y.to(device))


def base(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def optimizer_of(method: Callable[..., Any], model: nn.Module, data: Any, **options: Any) -> steppe.SharpnessAware:
    """Return the method around SGD; n-SAM takes its perturbation from the batch itself."""
    if "full" in inspect.signature(method).parameters:
        options["full"] = steppe.Batch(model, losses, data)
    return method(base(model), **options)


def after_steps(method: Callable[..., Any], device: torch.device, dtype: torch.dtype, way: str) -> list[Tensor]:
    """Return the weights after some steps."""
    model, data = made(device, dtype)
    optimizer = optimizer_of(method, model, data, **WAYS[way])
    for _ in range(STEPS):
        optimizer.step(steppe.Batch(model, losses, data))
    return [p.detach().cpu() for p in model.parameters()]


def agreement(method: Callable[..., Any]) -> Callable[[Setting], Result]:
    """Return the job that compares a method's weights with those of the CPU."""

    def run(setting: Setting) -> Result:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a rule falls back to the loop is the same on both
            found = {f"{way} {dtype}": one(setting, way, dtype) for way in WAYS for dtype in BOUND}
        worst = {str(dtype): max(v for k, v in found.items() if str(dtype) in k) for dtype in BOUND}
        right = all(worst[str(dtype)] <= bound for dtype, bound in BOUND.items())
        return {"right": right, "difference": found, "summary": f"{'right' if right else 'WRONG'} {worst}"}

    def one(setting: Setting, way: str, dtype: torch.dtype) -> float:
        here, there = after_steps(method, setting.device, dtype, way), after_steps(method, CPU, dtype, way)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(here, there, strict=True))

    return run


CPU = torch.device("cpu")


def replay(setting: Setting) -> Result:
    """With dropout, radius 0 is the base to the bit, and both passes over the sample draw the same masks."""
    ends = {}
    for way in ("plain", "SAM", "sampled"):
        model, data = made(setting.device, dropout=0.5)
        torch.manual_seed(1)
        plain, options = base(model), {"m": 4, "sampled": 1, "parallel": False} if way == "sampled" else {}
        optimizer = plain if way == "plain" else steppe.SAM(plain, rho=0.0 if way == "SAM" else 1e-30, **options)
        for _ in range(STEPS):
            optimizer.step(steppe.Batch(model, losses, data))
        ends[way] = torch.cat(
            [p.detach().flatten() for p in model.parameters()] + [torch.rand(3, device=setting.device)]
        )
    right = {way: bool((ends[way] == ends["plain"]).all()) for way in ("SAM", "sampled")}
    return {"right": all(right.values()), "equal": right, "summary": str(right)}


def mixed(dtype: torch.dtype) -> Callable[[Setting], Result]:
    """Return the job of autocast; float16 with a scaler whose first scale overflows."""

    def run(setting: Setting) -> Result:
        model, data = made(setting.device)
        scaler = torch.amp.GradScaler(setting.device.type, init_scale=2.0**40) if dtype == torch.float16 else None

        def cast(model: nn.Module, data: Any) -> Tensor:
            with torch.autocast(setting.device.type, dtype):
                return losses(model, data)

        optimizer, seen = steppe.SAM(base(model), m=4), []
        for _ in range(40):
            seen.append(float(optimizer.step(steppe.Batch(model, cast, data, scaler=scaler))))
            if scaler is not None:
                scaler.update()
        fell, skipped = seen[-1] < seen[0], int(optimizer.telemetry.skipped)
        right = fell and (skipped > 0) == (scaler is not None)
        return {
            "right": right,
            "loss": [seen[0], seen[-1]],
            "skipped": skipped,
            "summary": f"{seen[0]:.3f} -> {seen[-1]:.3f}",
        }

    return run


def waits(setting: Setting) -> Result:
    """Count what makes the host wait: nothing without the finite check, one thing with it."""
    if setting.device.type != "cuda":
        return {"summary": "needs CUDA"}
    found = {}
    for way, options in WAYS.items():
        for check in (False, True):
            model, data = made(setting.device)
            optimizer, batch = steppe.SAM(base(model), check_finite=check, **options), steppe.Batch(model, losses, data)
            for _ in range(4):  # warm up; the first steps verify shared passes
                optimizer.step(batch)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step(batch)
            torch.cuda.set_sync_debug_mode("default")
            found[f"{way}, check_finite={check}"] = sum("synchroniz" in str(w.message) for w in caught)
    right = all(n <= ("True" in way) for way, n in found.items())
    return {"right": right, "waits": found, "summary": str(found)}


def graph(setting: Setting) -> Result:
    """Capture one step of SAM in a CUDA graph; replays equal steps that are not captured."""
    if setting.device.type != "cuda":
        return {"summary": "needs CUDA"}
    ends = []
    for captured in (False, True):
        model, data = made(setting.device)
        options = {"lr": torch.tensor(0.05, device=setting.device), "capturable": True}
        optimizer = steppe.SAM(torch.optim.Adam(model.parameters(), **options), check_finite=False)
        batch = steppe.Batch(model, losses, data)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step(batch)
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            whole = torch.cuda.CUDAGraph()
            with torch.cuda.graph(whole):
                optimizer.step(batch)
            for _ in range(3):
                whole.replay()
        else:
            for _ in range(3):
                optimizer.step(batch)
        torch.cuda.synchronize()
        ends.append([p.detach().clone() for p in model.parameters()])
    difference = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    return {"right": difference < 1e-5, "difference": difference, "summary": f"difference {difference:.1e}"}


def formats(setting: Setting) -> Result:
    """Channels-last memory and ``torch.compile`` give the step of the plain model."""
    ends = {}
    for way in ("plain", "channels_last", "compiled"):
        model, (x, y) = made(setting.device)
        if way == "channels_last":
            model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        run = torch.compile(model) if way == "compiled" else model
        optimizer = steppe.SAM(base(model))
        for _ in range(STEPS):
            optimizer.step(steppe.Batch(run, losses, (x, y)))
        ends[way] = [p.detach().cpu() for p in model.parameters()]
    far = {w: max(float((a - b).abs().max()) for a, b in zip(ends[w], ends["plain"], strict=True)) for w in ends}
    return {"right": max(far.values()) < 1e-3, "difference": far, "summary": str(far)}


def nccl(setting: Setting) -> Result:
    """One process with NCCL (Gloo on a CPU): the replica steps as the model alone."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29517"))
    distributed.init_process_group("nccl" if setting.device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        ends = []
        for replicated in (False, True):
            model, data = made(setting.device)
            run = DistributedDataParallel(model) if replicated else model
            optimizer = steppe.SAM(base(model), m=4)
            for _ in range(STEPS):
                optimizer.step(steppe.Batch(run, losses, data))
            ends.append([p.detach().cpu() for p in model.parameters()])
    finally:
        distributed.destroy_process_group()
    difference = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    return {"right": difference < 1e-5, "difference": difference, "summary": f"difference {difference:.1e}"}


JOBS = [
    *(Job(f"checks/agree-{method.__name__}", 6, agreement(method)) for method in steppe.METHODS),
    Job("checks/replay", 5, replay),
    Job("checks/fp16", 8, mixed(torch.float16)),
    Job("checks/bf16", 8, mixed(torch.bfloat16)),
    Job("checks/waits", 5, waits),
    Job("checks/graph", 8, graph),
    Job("checks/formats", 40, formats),
    Job("checks/nccl", 10, nccl),
]
