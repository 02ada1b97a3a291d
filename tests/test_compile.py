"""Compiled models: one graph for all passes and steps. CUDA graphs, where there is a device."""

import shutil

import pytest
import torch
from torch import nn

import steppe
from tests.cases import METHODS, World, assert_close, each_method, optimizer, same_bits, sgd, world

GRAPHS = {  # beside the one: of forwards without gradients, and of another number of examples
    "RWSAM": 1,
    "RWSAM probe": 1,
    "ReweightedSharpness": 1,
    "ReweightedSharpness probe": 1,
    "XSAM": 1,
    "ESAM": 2,
}


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


def compiled(w: World, backend: object) -> World:
    model = torch.compile(w.model, backend=backend)
    return World(model, w.x, w.y, w.x, w.y)  # n-SAM's larger batch would be another shape


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_method
def test_one_graph_for_all_passes_and_steps(case) -> None:
    plain, ours, count = world(), world(), Counting()
    w = compiled(ours, count)
    a, b = optimizer(case, w), optimizer(case, World(plain.model, plain.x, plain.y, plain.x, plain.y))
    b._stepper.parallel = False  # a compiled model has no factors
    made = []
    for mine, theirs in zip(w.batches(4), plain.batches(4), strict=True):
        a.step(mine)
        b.step(theirs)
        made.append(count.graphs)
    assert made == [1 + GRAPHS.get(case.name, 0)] * 4
    assert_close(ours, plain, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("how", ["micro-batches", "closure", "accumulated", "two calls", "frozen", "radius"])
def test_one_graph_however_the_step_is_called(how: str) -> None:
    count = Counting()
    w = compiled(world(), count)
    m = 5 if how == "micro-batches" else None
    opt = steppe.WSAM(sgd(w), rho=0.1, m=m, model=w.model if how == "two calls" else None)
    for step, batch in enumerate(w.batches(4)):
        if how == "accumulated":
            opt.step([batch.subset(torch.arange(5)), batch.subset(torch.arange(5, 10))])
        elif how == "two calls":
            batch()
            opt.first_step()
            batch()
            opt.second_step()
        else:
            opt.param_groups[0]["rho"] = 0.1 * (step + 1) if how == "radius" else 0.1
            opt.step((lambda batch=batch: batch()) if how == "closure" else batch)
    assert count.graphs == 1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="the compiler needs a C compiler")
def test_the_default_compiler() -> None:
    ours, plain = world(torch.float32), world(torch.float32)
    w = compiled(ours, "inductor")
    a = steppe.SAM(sgd(w), rho=0.1)
    b = steppe.SAM(sgd(plain), rho=0.1)
    for mine, theirs in zip(w.batches(3), plain.batches(3), strict=True):
        a.step(mine)
        b.step(theirs)
    assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plain_closure", [False, True])
def test_parts_may_be_compiled_in_place(plain_closure: bool) -> None:
    ours, plain = world(), world()
    for part in ours.model.children():
        part.compile(backend="aot_eager")
    a, b = steppe.SAM(sgd(ours), rho=0.1), steppe.SAM(sgd(plain), rho=0.1)
    for mine, theirs in zip(ours.batches(3), plain.batches(3), strict=True):
        a.step((lambda batch: lambda: batch())(mine) if plain_closure else mine)
        b.step(theirs)
    assert_close(ours, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case", [c for c in METHODS if c.name in ("SAM", "WSAM", "GSAM", "ASAM")], ids=lambda c: c.name
)
def test_a_step_is_captured_by_a_cuda_graph(case) -> None:
    """Captured steps are the steps: replayed on new data in the same memory."""
    w, plain = world(torch.float32), world(torch.float32)
    for each in (w, plain):
        each.model.cuda()
        each.x, each.y = each.x.cuda(), each.y.cuda()
    w.full_x = w.full_y = plain.full_x = plain.full_y = None
    a, b = optimizer(case, w), optimizer(case, plain)
    a._stepper.check_finite = b._stepper.check_finite = False  # skipping a step is a decision of the host
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            a.step(w.batch)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        b.step(plain.batch)
    assert same_bits(w.weights(), plain.weights())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        a.step(w.batch)
    for _ in range(4):
        new = torch.randn_like(w.x)
        w.x.copy_(new)
        plain.x.copy_(new)
        graph.replay()
        b.step(plain.batch)
        for p, q in zip(w.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_linear_layers_in_bfloat16_autocast_compile_once() -> None:
    count = Counting()
    torch.manual_seed(0)
    model = torch.compile(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), backend=count)
    w = world(torch.float32)

    def loss(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(data[0]), data[1], reduction="none").float()

    opt = steppe.GSAM(sgd(model))
    for _ in range(3):
        opt.step(steppe.Batch(model, loss, (w.x, w.y)))
    assert count.graphs == 1
