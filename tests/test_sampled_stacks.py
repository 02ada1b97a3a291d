"""Sampled m-SAM and ascent on a subset under autocast, activation checkpointing and compilation, and in two calls."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steppe
from steppe import Micro, Rule, Subset
from tests.cases import World, assert_close, flat, same_bits, sgd, world
from tests.test_compile import Counting, compiled
from tests.test_sampled import RHO, draw

PARTS = [{"m": 3, "sampled": 1}, {"m": 3, "sampled": 2, "clip": 0.5}, {"ascent": 3}]
each_part = pytest.mark.parametrize("part", PARTS, ids=["sampled", "clipped", "ascent"])
CHOSEN = [0, 3, 8]


class Checkpointed(nn.Module):
    """Layers with dropout, recomputed in the backward pass or not."""

    def __init__(self, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(i, o), nn.Dropout(0.3)) for i, o in [(5, 7), (7, 7), (7, 3)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputed else layer(x)
        return x


@each_part
def test_activation_checkpointing_changes_nothing(part: dict) -> None:
    ours, theirs = (world(torch.float64, lambda r=recomputed: Checkpointed(r)) for recomputed in (True, False))
    a, b = (steppe.WSAM(sgd(w), RHO, parallel=False, **part) for w in (ours, theirs))
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        torch.manual_seed(1)
        a.step(mine)
        torch.manual_seed(1)
        b.step(other)
    assert same_bits(ours.weights(), theirs.parameters())
    assert a.telemetry.passes == pytest.approx(b.telemetry.passes)


@each_part
def test_one_more_graph_for_the_sample(part: dict) -> None:
    """That of another number of examples, for all steps."""
    torch._dynamo.reset()
    plain, ours, count = world(), world(), Counting()
    w = compiled(ours, count)
    a, b = (steppe.SAM(sgd(x), RHO, parallel=parallel, **part) for x, parallel in ((w, "auto"), (plain, False)))
    made = []
    for mine, theirs in zip(w.batches(4), plain.batches(4), strict=True):
        a.step(mine)
        b.step(theirs)
        made.append(count.graphs)
    assert made == [2] * 4
    assert_close(ours, plain, atol=1e-10, rtol=1e-9)
    torch._dynamo.reset()


def low_gradient(w: World, rows: list[int], eps: torch.Tensor | float = 0.0) -> torch.Tensor:
    there = copy.deepcopy(w)
    nn.utils.vector_to_parameters(flat(w.model) + eps, there.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        losses = there.criterion(there.model(w.x[rows]), w.y[rows])
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), there.parameters())])


@pytest.mark.parametrize("around", ["the loss", "the step"])
@pytest.mark.parametrize("rule", [Micro(3, Rule(), sampled=1), Rule(Subset(3))], ids=["sampled", "ascent"])
def test_autocast_is_the_formula_in_low_precision(rule: object, around: str, monkeypatch) -> None:
    w = world(torch.float32)
    draw(monkeypatch, [CHOSEN])
    everyone = list(range(len(w.x)))
    d = low_gradient(w, CHOSEN)
    eps = RHO * d / d.norm()
    if isinstance(rule, Micro):
        u = low_gradient(w, everyone) + low_gradient(w, CHOSEN, eps) - d
    else:
        u = low_gradient(w, everyone, eps)
    before = flat(w.model)

    def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "the loss" or torch.is_autocast_enabled("cpu")):
            return w.criterion(model(data[0]), data[1])

    opt = steppe.SharpnessAware(sgd(w), rule, RHO, parallel=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=around == "the step"):
        opt.step(steppe.Batch(w.model, loss, (w.x, w.y)))
    torch.testing.assert_close(flat(w.model), before - 0.1 * u, rtol=1e-4, atol=1e-6)


@each_part
def test_backward_then_step_is_one_step(part: dict) -> None:
    ours, theirs = world(), world()
    a, b = (steppe.WSAM(sgd(w), RHO, max_norm=0.5, **part) for w in (ours, theirs))
    for mine, other in zip(ours.batches(3), theirs.batches(3), strict=True):
        assert torch.equal(a.backward(mine), b.step(other))
        a.step()
    assert same_bits(ours.weights(), theirs.parameters())


@each_part
def test_a_scaler_that_overflows_skips_the_step(part: dict) -> None:
    """In whichever pass; its scale changes nothing else."""
    w = world(torch.float32)
    w.x = 1000 * w.x
    s = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    opt = steppe.SAM(sgd(w), RHO, parallel=False, **part)
    before = w.weights()
    opt.step(w.batch, scaler=s)  # no warning: a scaler looks for its scale by overflows
    s.update()
    assert opt.telemetry.was_skipped
    assert same_bits(before, w.parameters())
    assert s.get_scale() < 2.0**127
