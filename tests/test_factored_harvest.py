"""Gradients gathered while backward runs, and patches of convolutions."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from steppe.factored import shared
from steppe.factored.collect import Collector, Cost
from steppe.factored.gradients import Factors, Whole
from steppe.factored.maps import Conv, Dense, Use
from steppe.factored.microbatches import MicroBatches
from tests.cases import sgdm
from tests.factored_models import EXAMPLES, Example, hold
from tests.test_factored import N, assert_equal, ends

CONVS = {
    "1-d": Conv((2,), (1,), (2,), 1, torch.Size([5, 3, 3])),
    "2-d": Conv((1, 2), (1, 0), (1, 2), 1, torch.Size([5, 3, 3, 2])),
    "2-d, whole": Conv((1, 1), (0, 0), (1, 1), 1, torch.Size([5, 3, 9, 7])),
    "3-d": Conv((1, 2, 3), (0, 1, 2), (2, 1, 1), 1, torch.Size([5, 3, 1, 2, 3])),
}
SIZE = (9, 7, 6)


@pytest.mark.parametrize("name", CONVS)
def test_patches_convolve_and_their_transpose_too(name: str) -> None:
    conv = CONVS[name]
    torch.manual_seed(0)
    x = torch.randn(4, 3, *SIZE[: len(conv.stride)], dtype=torch.float64, requires_grad=True)
    W = torch.randn(conv.weight, dtype=torch.float64)
    y = conv.apply(x[None], W.flatten(1)[None])[0]
    columns = W.movedim(1, -1).flatten(1)  # as patches are: channels last
    rows = conv.patches(x.detach())
    assert list(y.shape[2:]) == conv.positions(x.shape[2:])
    torch.testing.assert_close((rows @ columns.mT).mT.reshape(y.shape), y.detach(), rtol=1e-12, atol=1e-12)
    delta = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, delta)
    back = conv.from_patches(delta.flatten(2).mT @ columns, x.shape)
    torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)


def test_patches_are_those_of_unfold() -> None:
    conv = Conv((2, 1), (1, 2), (1, 2), 1, torch.Size([1, 3, 2, 3]))
    x = torch.randn(4, 3, 8, 7)
    theirs = F.unfold(x, conv.weight[2:], conv.dilation, conv.padding, conv.stride).mT
    ours = conv.patches(x).unflatten(2, (2, 3, 3)).movedim(-1, 2).flatten(2)
    assert torch.equal(ours, theirs)


class Pyramid(nn.Module):
    """One kernel on maps of two sizes: by their own, the large one would be held, and the small one not."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.conv = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        large = torch.tanh(self.conv(torch.tanh(self.lift(x))))
        return self.head(torch.tanh(self.conv(F.max_pool2d(large, 4))).mean((2, 3)))


PYRAMID = Example(Pyramid, lambda n: (torch.randn(n, 2, 8, 8), torch.randint(3, (n,))))


@pytest.mark.parametrize("m", [1, 5])
def test_uses_of_a_kernel_are_held_together(m: int) -> None:
    make = lambda model, p: steppe.WSAM(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
    assert_equal(ends(PYRAMID, make), 1e-10)


class InPlace(nn.Module):
    """Whatever may be changed in place right after it was made."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims, self.embed, self.line = dims, nn.Embedding(9, 6), nn.Linear(6, 6)
        self.conv, self.places = nn.Conv1d(4, 5, 3), nn.Parameter(torch.randn(1, 4, 6))
        self.norm, self.head = nn.GroupNorm(1, 5), nn.Linear(20, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        x += self.places
        x = self.line(x.flatten(0, 1) if self.dims == 2 else x).relu_().reshape(-1, 4, 6)
        x = self.norm(self.conv(x).relu_()).relu_()
        y = self.head(x.flatten(1))
        y *= 2
        return y


@pytest.mark.parametrize("whole", [None, True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_what_a_layer_returns_may_be_changed_in_place(dims: int, whole: bool | None, monkeypatch) -> None:
    hold(whole, monkeypatch)
    example = Example(lambda: InPlace(dims), lambda n: (torch.randint(9, (n, 4)), torch.randint(3, (n,))))
    for m in (1, 5):
        make = lambda model, p, m=m: steppe.WSAM(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
        assert_equal(ends(example, make), 1e-10)


def test_failed_collecting_is_freed_before_the_serial_loop_runs(monkeypatch, rehearsed_once) -> None:
    """Out of memory, the factors are what has to go first."""
    collectors: list[weakref.ref[Collector]] = []

    class Poor(Collector):
        def take(self, site):
            super().take(site)
            if self.matrices:
                collectors.append(weakref.ref(self))
                raise MemoryError("no more")

    example = EXAMPLES["mlp"]
    model = example.model(torch.float32)
    opt = steppe.SAM(sgdm(model), 0.1, m=3)
    opt.step(example.batch(model, N, torch.float32))
    monkeypatch.setattr(shared, "Collector", Poor)
    alive: list[bool] = []
    model.register_forward_pre_hook(
        lambda *_: alive.append(any(h() is not None for h in collectors)) if collectors else None
    )
    gc.collect()
    gc.disable()
    try:
        opt.step(example.batch(model, N, torch.float32))
    finally:
        gc.enable()
    assert len(collectors) == 1
    assert alive == [False] * 8  # four micro-batches, two passes


def test_weights_are_perturbed_once() -> None:
    parts = MicroBatches(4, 1)
    G = Whole([Use(Dense(), torch.randn(4, 2, 5), torch.randn(4, 2, 3))], parts)
    W, s = torch.randn(3, 5), torch.rand(4)
    expected = W + s[:, None, None] * G.chunks[0].clone()
    for _ in range(2):  # forward, backward
        torch.testing.assert_close(torch.cat(list(G.weights(W, s, W.dtype))), expected)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_leaves_no_garbage(name: str) -> None:
    """What a step took is free when it ends, not when the collector comes round to it."""
    example = EXAMPLES[name]
    for make in (lambda b: steppe.SAM(b, 0.1, m=5, parallel=True), lambda b: steppe.RWSAM(b, 0.1, parallel=True)):
        model = example.model(torch.float32)
        opt = make(sgdm(model))
        batches = [example.batch(model, N, torch.float32, seed=k) for k in range(4)]
        for batch in batches[:3]:
            opt.step(batch)
        gc.freeze()  # what other tests leave behind is not collected, whenever it becomes garbage
        gc.disable()
        try:
            opt.step(batches[3])
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [o for o in gc.garbage if isinstance(o, Tensor | Whole | Factors)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.unfreeze()
            gc.enable()
        assert not left


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("method", ["SAM", "RWSAM"])
def test_what_was_recorded_is_let_go_of_as_backward_goes(method: str, whole: bool, monkeypatch, rehearsed_once) -> None:
    waiting: list[int] = []  # sites that still hold something, whenever one has been taken
    alive: list[bool] = []  # and whether the gradients that came last are in use

    class Watched(Collector):
        def take(self, site):
            super().take(site)
            waiting.append(sum(bool(s.deltas) for s in self.first.sites))
            alive.append(any(isinstance(g, Factors) for g in self.matrices.values()))

    monkeypatch.setattr(Cost, "whole", lambda *_: whole)
    monkeypatch.setattr(shared, "Collector", Watched)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)], nn.Linear(6, 3))
    options = {"m": 3} if method == "SAM" else {}
    opt = getattr(steppe, method)(sgdm(model), 0.1, parallel=True, **options)
    opt.step(
        steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), torch.randn(N, 6), torch.randint(3, (N,)))
    )
    assert waiting[-6:] == [1] * 6  # the one that has just been taken: those before it are gone
    assert alive[-6:] == [not whole] * 6
