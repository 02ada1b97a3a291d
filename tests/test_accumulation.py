"""A list of batches is one step: that of one large batch."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import steppe
from tests.cases import CASES, Case, N, each_base, optimizer, same_bits, world

CUTS = (0, 4, 8, N)  # multiples of m, except the last


def chunks(batch: steppe.Batch, cuts=CUTS) -> list[steppe.Batch]:
    return [batch.subset(torch.arange(a, b)) for a, b in pairwise(cuts)]


@each_base
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accumulated_is_one_large_batch(case: Case, base: str) -> None:
    ours, theirs = world(), world()
    a, b = optimizer(case, ours, base), optimizer(case, theirs, base)
    if "RWSAM" in case.name:  # exact norms are those of a batch whose factors are all held
        a._parallel = b._parallel = False
    cuts = (0, 5, N) if case.name == "micro of every" else CUTS  # its m is 5
    for split, whole in zip(ours.batches(3), theirs.batches(3), strict=True):
        loss = a.step(chunks(split, cuts))
        torch.testing.assert_close(loss, b.step(whole), rtol=1e-10, atol=1e-12)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-9)


def test_one_batch_is_held_at_a_time() -> None:
    w, held, most = world(), [0], [0]

    class Counting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            held[0] += len(x)
            ctx.n = len(x)
            most[0] = max(most[0], held[0])
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            held[0] -= ctx.n
            return g

    loss = lambda model, data: w.criterion(Counting.apply(model(data[0])), data[1])  # noqa: E731
    batch = steppe.Batch(w.model, loss, (w.x, w.y))
    opt = steppe.WSAM(torch.optim.SGD(w.parameters(), lr=0.1))
    opt.step(chunks(batch))
    assert most == [4]
    assert opt.telemetry.forwards == pytest.approx(2)


def test_micro_batches_of_a_batch_each() -> None:
    """m at the size of a batch is a perturbation for every batch, in shared passes or not."""
    for m in (4, 2):
        ours, theirs = world(), world()
        a = steppe.SAM(torch.optim.SGD(ours.parameters(), lr=0.1), rho=0.1, m=m, parallel=True)
        b = steppe.SAM(torch.optim.SGD(theirs.parameters(), lr=0.1), rho=0.1, m=m, parallel=False)
        a.step(chunks(ours.batch))
        b.step(theirs.batch)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_batches_of_different_shapes_and_dropout() -> None:
    """Ragged lengths cannot be one tensor; both passes draw the same masks, batch by batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Dropout(0.5), nn.Linear(6, 11))
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append(out != 0))

    def loss(model, tokens):
        return nn.functional.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(
            1
        )

    parts = [steppe.Batch(model, loss, torch.randint(11, (n, length))) for n, length in ((3, 5), (2, 9), (4, 3))]
    opt = steppe.GSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    opt.step(parts)
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    assert not torch.equal(seen[0][:2, :3], seen[1][:, :3])


def test_batch_statistics_are_those_of_ordinary_accumulation() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    w = world(torch.float32)
    for model, wrap in zip(models, (True, False), strict=True):
        parts = chunks(steppe.Batch.supervised(model, w.criterion, w.x, w.y))
        if wrap:
            steppe.WSAM(torch.optim.SGD(model.parameters(), lr=0.1)).step(parts)
        else:
            for part in parts:
                part()
    assert same_bits(list(models[0].buffers()), list(models[1].buffers()))


def test_scaled_accumulation() -> None:
    ours, theirs = world(), world()
    s = torch.amp.GradScaler("cpu", init_scale=256.0)
    a = steppe.WSAM(torch.optim.SGD(ours.parameters(), lr=0.1))
    b = steppe.WSAM(torch.optim.SGD(theirs.parameters(), lr=0.1))
    a.step(chunks(ours.batch), scaler=s)
    s.update()
    b.step(chunks(theirs.batch))
    assert same_bits(ours.weights(), theirs.weights())


def test_bad_lists() -> None:
    w, other = world(), world()
    opt = steppe.SAM(torch.optim.SGD(w.parameters(), lr=0.1))
    before = w.weights()
    with pytest.raises(ValueError, match="batches must hold at least one batch, got 0"):
        opt.step([])
    with pytest.raises(TypeError, match=r"batches must hold steppe\.Batch alone, got function"):
        opt.step([w.batch, lambda: 0.0])
    with pytest.raises(ValueError, match="batches must share one model"):
        opt.step([w.batch, other.batch])
    with pytest.raises(TypeError, match="closure must be a function"):
        opt.step(3.0)
    assert same_bits(before, w.weights())


def test_batches_as_an_ordinary_closure() -> None:
    w = world()
    whole = w.batch()
    g = [p.grad for p in w.parameters()]
    torch.testing.assert_close(steppe.Batches(chunks(w.batch))(), whole)
    torch.testing.assert_close([p.grad for p in w.parameters()], g)
    nested = steppe.Batches([steppe.Batches(chunks(w.batch)[:2]), chunks(w.batch)[2]])
    torch.testing.assert_close(nested.losses(), w.batch.losses())
