"""Step times and peak memory, as ratios to the base optimizer's plain step in the same run."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import steppe
from benchmarks.gpu.jobs import Job, Result, Setting
from benchmarks.gpu.models import CASES, TINY, Case, classify
from benchmarks.memory import peak
from benchmarks.rivals import NAME, other
from benchmarks.timing import Timer, interleave, synchronize
from benchmarks.vmap_sam import VmapSAM

Step = Callable[[], object]
ROUNDS, LIMIT = 5, 4.0  # samples of a way, and about how many seconds they may take
TRIAL = 1, 0.1  # the same of tiny models


class Bench:
    """A case's model and batch on the device; every way to step makes its own optimizer on them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = case.model().to(device)
        self.data = tuple(t.to(device) for t in case.data(case.n))
        self.n, self.device, self.bf16 = case.n, device, case.bf16
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def base(self) -> torch.optim.Optimizer:
        """Return AdamW with a step so small that the weights hardly change."""
        return torch.optim.AdamW(self.trained, lr=1e-8)

    def loss(self, model: nn.Module, data: Any) -> Tensor:
        """Every example's loss, under autocast where the case says so."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return classify(model, data)

    def backward(self) -> Tensor:
        """Be the plain closure."""
        for p in self.trained:
            p.grad = None
        loss = self.loss(self.model, self.data).mean()
        loss.backward()
        return loss

    def batch(self) -> steppe.Batch:
        """Return the batch, new for every step as in training."""
        return steppe.Batch(self.model, self.loss, self.data)

    def ways(self) -> Iterator[tuple[str, Step]]:
        """Yield every way to step that the batch size allows."""
        n = self.n
        yield "SAM, closure", self.closure(steppe.SAM(self.base(), check_finite=False))
        yield "SAM", self.on_batch(steppe.SAM(self.base()))
        yield "RWSAM", self.on_batch(steppe.RWSAM(self.base()))
        for m in sorted({max(1, n // 16), n // 8}):
            yield f"sampled, m={m}", self.on_batch(steppe.SAM(self.base(), m=m, sampled=1))
            if "ascent" in inspect.signature(steppe.SharpnessAware).parameters:
                yield f"ascent, m={m}", self.on_batch(steppe.SAM(self.base(), ascent=m))  # type: ignore[call-arg]
        for m in (m for m in (1, 2, 4, 8, 16, 32, 64) if m < n and n % m == 0):
            yield f"m-SAM, m={m}", self.on_batch(steppe.SAM(self.base(), m=m))
        for m in (m for m in (1, 8) if m < n and n % m == 0):
            yield f"m-SAM serially, m={m}", self.on_batch(steppe.SAM(self.base(), m=m, parallel=False))
        if n % 8 == 0 and n > 8:
            vmap = VmapSAM(self.base(), self.model, self.loss, 8)
            yield "m-SAM by vmap, m=8", lambda: vmap.step(self.data)
        if other is not None:
            rival = other.SAM(self.trained, torch.optim.AdamW, lr=1e-8)
            yield f"SAM of {NAME}", lambda: (self.backward(), rival.step(self.backward))

    def closure(self, optimizer: steppe.SharpnessAware) -> Step:
        """Return a step on the plain closure."""
        return lambda: optimizer.step(self.backward)

    def on_batch(self, optimizer: steppe.SharpnessAware) -> Step:
        """Return a step on the batch."""
        return lambda: optimizer.step(self.batch())


def host_share(step: Step, device: torch.device) -> float:
    """Return which share of a step's time passes before Python has queued all of it: near 1, Python is the limit."""
    synchronize(device)
    start = time.perf_counter()
    step()
    queued = time.perf_counter()
    synchronize(device)
    return round((queued - start) / (time.perf_counter() - start), 3)


def prepared(name: str, step: Step, setting: Setting) -> tuple[dict[str, Any], Timer | None]:
    """Return the row of a way with its peak memory and a warmed-up timer, or with why there is none."""
    device = setting.device
    try:
        for _ in range(3):  # the first steps verify shared passes
            step()
        timer = Timer(step, device)
        timer.prepare(*(TRIAL if setting.tiny else (ROUNDS, LIMIT)))
        return {"way": name, "host": host_share(step, device), "peak_mib": round(peak(step, device) / 2**20)}, timer
    except (RuntimeError, ValueError, TypeError) as error:  # out of memory, mostly
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"way": name, "error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}, None


def times(name: str) -> Callable[[Setting], Result]:
    """Return the job that times one case."""

    def run(setting: Setting) -> Result:
        if setting.tiny and name not in TINY:
            return {"summary": "has no tiny version"}
        case = (TINY if setting.tiny else CASES)[name]
        bench = Bench(case, setting.device)
        plain = bench.base()
        reference, base = prepared("base", lambda: (bench.backward(), plain.step()), setting)
        if base is None:
            return {"error": reference["error"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the record says which way is slow
            rows = [prepared(way, step, setting) for way, step in bench.ways()]
            interleave(base, [timer for _, timer in rows if timer is not None])
        found = [row | (timer.row() if timer else {}) for row, timer in [(reference, base), *rows]]
        told = {row["way"]: row.get("ratio") for row in found}
        size = sum(p.numel() for p in bench.model.parameters())
        return {"case": name, "n": case.n, "parameters": size, "bf16": case.bf16, "rows": found, "summary": str(told)}

    return run


JOBS = [Job(f"speed/{name}", 90, times(name)) for name in CASES]
