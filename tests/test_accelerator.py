"""Steps on a device: real numbers on the stand-in of :mod:`tests.accelerator`, which refuses and counts as CUDA would.

What it stands in for and no more: kernels, streams, the allocator and autograd's device threads are the CPU's. The
random stream of a device, ``torch.tensor(values, device=)`` and whether a graph is being captured are patched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.factored.engine import SharedPasses
from tests.accelerator import Accelerator, OnDevice
from tests.cases import sgdm
from tests.factored_models import EXAMPLES, loss

N, STEPS = 8, 4  # the first three steps rehearse
READ = "aten._local_scalar_dense.default"
Make = Callable[[nn.Module, steppe.Batch], steppe.SharpnessAware]


def named(method: type[steppe.SharpnessAware], **options: Any) -> Make:
    if method is steppe.NSAM:
        return lambda model, batch: method(sgdm(model), full=batch, **options)
    if method is steppe.PreconditionedSAM:
        return lambda model, batch: method(torch.optim.AdamW(model.parameters(), lr=1e-2), **options)
    return lambda model, batch: method(sgdm(model), **options)


def on_cpu(name: str, make: Make, loss: Any = loss, steps: int = STEPS) -> list[Tensor]:
    """The weights after some steps, as ever."""
    model = EXAMPLES[name].model(torch.float32)
    batch = steppe.Batch(model, loss, EXAMPLES[name].batch(model, N, torch.float32).data)
    optimizer = make(model, batch)
    for _ in range(steps):
        optimizer.step(batch)
    return [p.detach().clone() for p in model.parameters()]


def on_device(a: Accelerator, name: str, loss: Any = loss) -> tuple[nn.Module, steppe.Batch]:
    model = EXAMPLES[name].model(torch.float32)
    data = EXAMPLES[name].batch(model, N, torch.float32).data
    a.move(model)
    return model, steppe.Batch(model, loss, tuple(t.to("cuda:0") for t in data))


def last_step(a: Accelerator, step: Callable[[], object], steps: int = STEPS) -> tuple[list[str], list[str]]:
    """What the last of some steps waits for, and what it makes on the CPU."""
    for _ in range(steps):
        a.waits.clear()
        a.strays.clear()
        step()
    return list(a.waits), list(a.strays)


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


ON_THE_HOST = (steppe.AESAM, steppe.LightSAM)  # a number that the first decides by, or both remember
WAYS = {
    "whole": {},
    "serial": {"m": 3, "parallel": False},
    "shared": {"m": 3, "parallel": True},
    "shared, evenly": {"m": 4, "parallel": True, "max_norm": 0.1},
}
# parts of a batch are alike to all methods but for what moves beside, is remembered, chosen or weighed
SERIAL = (steppe.SAM, steppe.WSAM, steppe.FSAM, steppe.ESAM, steppe.RWSAM, steppe.LookSAM, *ON_THE_HOST)
BY_FACTORS = (steppe.RWSAM, steppe.ReweightedSharpness)  # norms of examples, where the model factors
SHARED = (steppe.SAM, steppe.USAM, steppe.UnifiedSAM, steppe.WSAM, steppe.CoupledWSAM, steppe.RWSAM)
CASES = [
    pytest.param("mlp", method, way, id=f"{method.__name__} {way}")
    for method in steppe.METHODS
    for way in WAYS
    if method in {"whole": steppe.METHODS, "serial": SERIAL}.get(way, SHARED)
    and method is not steppe.FunctionalSAM  # of which below
] + [
    pytest.param(name, method, "shared", id=f"{method.__name__} shared {name}")
    for name, method in (("cnn", steppe.RWSAM), ("resnet", steppe.WSAM), ("vit", steppe.SAM), ("gpt", steppe.RWSAM))
]


def captured(a: Accelerator, optimizer: steppe.SharpnessAware, batch: steppe.Batch) -> None:
    """Take a step in a CUDA graph, where a wait is an error, the finite guard's too."""
    optimizer._stepper.check_finite = False
    a.capturing = True
    a.waits.clear()
    optimizer.step(batch)
    assert a.waits == []


@pytest.mark.parametrize(("name", "method", "way"), CASES)
def test_a_step_waits_once_and_leaves_nothing_on_the_cpu(name: str, method: Any, way: str) -> None:
    """The steps are the CPU's; the one read is that of the finite guard. ESAM draws its mask on the host."""
    make = named(method, **WAYS[way])
    steps = STEPS if "shared" in way or method in BY_FACTORS else 2  # the others rehearse nothing
    with Accelerator() as a:
        model, batch = on_device(a, name)
        optimizer = make(model, batch)
        waits, strays = last_step(a, lambda: optimizer.step(batch), steps)
        state = [t for kept in optimizer.state.values() for t in kept.values() if t is not None and t.dim()]
        found = values(model.parameters())
        if method not in (*ON_THE_HOST, steppe.PreconditionedSAM):  # AdamW, its base, counts its steps on the host
            captured(a, optimizer, batch)
    assert waits == [READ] * (2 if method in ON_THE_HOST else 1)
    assert set(strays) == ({"aten.rand.generator", "aten.lt.Scalar"} if method is steppe.ESAM else set())
    assert state
    assert all(type(t) is OnDevice for t in state)
    close(found, on_cpu(name, make, steps=steps))


@pytest.mark.parametrize("m", [None, 3])
def test_functional_sam_on_a_device(m: int | None) -> None:
    make = named(steppe.FunctionalSAM, m=m)
    ends = []
    for device in ("cpu", "cuda:0"):
        model = EXAMPLES["mlp"].model(torch.float32)
        data = EXAMPLES["mlp"].batch(model, N, torch.float32).data
        with Accelerator() as a:
            if device != "cpu":
                a.move(model)
            x, y = (t.to(device) for t in data)
            batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)
            optimizer = make(model, batch)
            waits, strays = last_step(a, lambda o=optimizer, b=batch: o.step(b))
            ends.append(values(model.parameters()))
    assert (waits, strays) == ([READ], [])
    close(ends[1], ends[0])


OTHERS: dict[str, Make] = {
    "probe": named(steppe.RWSAM, parallel=False),
    "noise": named(steppe.SAM, gradient_noise=True, cosine=True),
    "adam": lambda model, batch: steppe.GSAM(torch.optim.AdamW(model.parameters(), lr=1e-2)),
    "scheduled": named(steppe.SAM, rho=steppe.schedule.Cosine(0.1, 0.01, 10), m=4, parallel=True),
}


@pytest.mark.parametrize("which", OTHERS)
def test_options_wait_no_longer(which: str) -> None:
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        optimizer = OTHERS[which](model, batch)
        waits, strays = last_step(a, lambda: optimizer.step(batch))
        found = values(model.parameters())
    assert (waits, strays) == ([READ], [])
    if which != "probe":  # whose directions are the device's own
        close(found, on_cpu("mlp", OTHERS[which]), 1e-5)


def test_accumulation_waits_once_and_for_a_choice_of_examples_once_more() -> None:
    for method, expected in ((steppe.SAM, [READ]), (steppe.ESAM, ["aten._to_copy.default", READ])):
        make = named(method)
        with Accelerator() as a:
            model, batch = on_device(a, "mlp")
            optimizer, chunks = make(model, batch), batch.split(3)
            waits, _ = last_step(a, lambda o=optimizer, c=chunks: o.step(c), 1)
            found = values(model.parameters())
        assert waits == expected
        close(found, on_cpu("mlp", make, steps=1))


def test_two_calls_wait_once() -> None:
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        optimizer = steppe.WSAM(sgdm(model))

        def step() -> None:
            batch()
            optimizer.first_step()
            batch()
            optimizer.second_step()

        waits, strays = last_step(a, step)
        found = values(model.parameters())
    assert (waits, strays) == ([READ], [])
    close(found, on_cpu("mlp", named(steppe.WSAM)))


# ---- CUDA graphs


def test_a_captured_model_is_not_rehearsed_again() -> None:
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        optimizer = steppe.SAM(sgdm(model), m=3, parallel=True, check_finite=False)
        last_step(a, lambda: optimizer.step(batch), 10)  # after so many it would be
        captured(a, optimizer, batch)


def test_a_model_is_rehearsed_before_its_step_is_captured() -> None:
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        optimizer = steppe.SAM(sgdm(model), m=2, check_finite=False)
        a.capturing = True
        with pytest.raises(RuntimeError, match="once before it is captured in a CUDA graph"):
            optimizer.step(batch)


# ---- what only a device has


@pytest.mark.parametrize("parallel", [True, False])
def test_a_step_that_is_not_finite_is_skipped_without_asking_first(parallel: bool) -> None:
    """``eps`` becomes 0 on the device: all passes run, and one read at the end tells."""
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        optimizer = steppe.SAM(sgdm(model), m=4, parallel=parallel)
        last_step(a, lambda: optimizer.step(batch))
        before = values(model.parameters())
        a.waits.clear()
        bad = steppe.Batch(model, loss, (batch.data[0] * torch.inf, batch.data[1]))
        with pytest.warns(UserWarning, match="not finite"):
            optimizer.step(bad)
        assert optimizer.telemetry.was_skipped
        assert a.waits == [READ]
        after = values(model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


def dropping(model: nn.Module, data: Any) -> Tensor:
    return F.cross_entropy(F.dropout(model(data[0]), 0.5), data[1], reduction="none")


@pytest.mark.parametrize("options", [{}, {"m": 4, "parallel": True}, {"m": 4, "parallel": False}])
def test_both_passes_draw_the_same_masks_from_the_device(options: dict[str, Any]) -> None:
    """With a tiny radius both passes agree only under one mask; the device's stream goes on as after one pass."""
    with Accelerator() as a:
        model, batch = on_device(a, "mlp", dropping)
        optimizer = steppe.SAM(sgdm(model), rho=1e-6, **options)
        optimizer.step(batch)
        torch.cuda.set_rng_state(torch.Generator().manual_seed(7).get_state(), "cuda:0")
        host, parts = torch.get_rng_state(), batch.split(4) if options.get("parallel") is False else [batch]
        optimizer.step(batch)
        assert abs(float(optimizer.telemetry.gap)) < 1e-4
        after = torch.cuda.get_rng_state("cuda:0")
        torch.cuda.set_rng_state(torch.Generator().manual_seed(7).get_state(), "cuda:0")
        for part in parts:
            part.losses()
        assert torch.equal(after, torch.cuda.get_rng_state("cuda:0"))
        assert torch.equal(host, torch.get_rng_state())


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)``: switched on as torch would, and the CPU's, where the tensors really are."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with torch.autocast("cpu", dtype):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


def half(model: nn.Module, data: Any) -> Tensor:
    with autocast(torch.bfloat16):
        return loss(model, data).float()


@pytest.mark.parametrize("options", [{}, {"m": 4, "parallel": False}, {"m": 4, "parallel": True}])
@pytest.mark.parametrize("name", ["mlp", "vit", "gpt"])
def test_bfloat16_autocast(name: str, options: dict[str, Any]) -> None:
    make = named(steppe.WSAM, rho=0.3, **options)
    with Accelerator() as a:
        model, batch = on_device(a, name, half)
        optimizer = make(model, batch)
        waits, strays = last_step(a, lambda: optimizer.step(batch))
        found = values(model.parameters())
    assert (waits, strays) == ([READ], [])
    close(found, on_cpu(name, make, half), 1e-4)


@pytest.mark.parametrize("m", [None, 4])
def test_a_scaler_adds_no_wait_of_the_step(m: int | None) -> None:
    with Accelerator() as a:
        model, batch = on_device(a, "mlp")
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20)
        optimizer = steppe.SAM(sgdm(model), m=m)
        scaled = steppe.Batch(model, loss, batch.data, scaler=scaler)

        def step() -> None:
            optimizer.step(scaled)
            count.append(len(a.waits))
            scaler.update()

        count: list[int] = []
        last_step(a, step)
        found = values(model.parameters())
    rehearsed = 3  # the first steps that look inside the batch
    assert count[rehearsed:] == [1] * (STEPS - rehearsed)
    close(found, on_cpu("mlp", named(steppe.SAM, m=m, parallel=False)), 1e-5)


class Split(nn.Module):
    """Two layers on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(x.to(self.two.weight.device))


@pytest.mark.parametrize(
    ("method", "m"), [(method, None) for method in steppe.METHODS] + [(method, 3) for method in SERIAL]
)
def test_a_model_on_two_devices(method: Any, m: int | None) -> None:
    ends = []
    for devices in (("cpu", "cpu"), ("cuda:0", "cuda:1")):
        torch.manual_seed(0)
        model, x, y = Split(), torch.randn(N, 5), torch.randint(3, (N,))
        with Accelerator() as a:
            if devices[0] != "cpu":
                a.move(model.one, devices[0])
                a.move(model.two, devices[1])
            x, y = x.to(devices[0]), y.to(devices[1])
            batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)
            parallel = method is steppe.RWSAM and devices[0] == "cpu" and "auto"
            optimizer = named(method, m=m, parallel=parallel)(model, batch)
            for _ in range(2):
                optimizer.step(batch)
            float(optimizer.telemetry.loss)
            ends.append(values(model.parameters()))
    if method not in (steppe.RWSAM, steppe.EigenSAM):  # their random directions are each device's own
        close(*ends)


def test_micro_batches_on_two_devices_run_serially_and_say_why() -> None:
    with Accelerator() as a:
        model = Split()
        a.move(model.one, "cuda:0")
        a.move(model.two, "cuda:1")
        data = torch.randn(N, 5).to("cuda:0"), torch.randint(3, (N,)).to("cuda:1")
        batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), *data)
        with pytest.raises(ValueError, match="parameters are on several devices"):
            steppe.SAM(sgdm(model), m=2, parallel=True).step(batch)
        with pytest.warns(UserWarning, match="parameters are on several devices"):
            steppe.SAM(sgdm(model), m=2).step(batch)


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit"])
@pytest.mark.parametrize("products", [False, True])
def test_tf32_keeps_no_model_from_factoring(name: str, products: bool) -> None:
    """Convolutions in float32 round their operands to ten bits on CUDA by default; matrix products on demand."""
    with Accelerator(tf32=("convolutions", "products") if products else ("convolutions",)) as a:
        model, batch = on_device(a, name)
        parameters = list(model.parameters())
        f = Oracle(batch, Parameters(parameters, Radii([0.1] * len(parameters))))
        assert SharedPasses(True).entry(f, batch).plan.reason == ""


# ---- the stand-in itself


def test_the_stand_in_refuses_and_counts() -> None:
    with Accelerator() as a:
        x, y = torch.randn(3, 3, device="cuda"), torch.randn(3, 3, device="cuda:1")
        assert (x.device, y.device) == (torch.device("cuda", 0), torch.device("cuda", 1))
        for other in (y, torch.randn(3, 3)):
            with pytest.raises(RuntimeError, match="same device"):
                x @ other
            with pytest.raises(RuntimeError, match="same device"):
                x + other
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([x.sum(), torch.zeros(())])
        assert (x * torch.tensor(2.0)).device == x.device  # a number of the host is welcome
        a.waits.clear()
        for wait in (
            lambda: bool(x.sum() > 0),
            lambda: float(x[0, 0]),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x[torch.tensor([0, 1])],
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.zeros(3).to(x),
            lambda: x.copy_(torch.zeros(3, 3)),
        ):
            wait()
            assert len(a.waits) >= 1
            a.waits.clear()
        for free in (
            lambda: torch.full((3,), 2.0, device="cuda"),
            lambda: x.new_zeros(3) + torch.arange(3, device="cuda"),
            lambda: x[torch.arange(2, device="cuda")],
            lambda: torch.zeros(3).to("cuda:0", non_blocking=True),
            lambda: x.to("cuda:1"),
            lambda: torch.topk(x.sum(1), 2),
        ):
            free()
            assert a.waits == []
        a.capturing = True
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            x.sum().item()
