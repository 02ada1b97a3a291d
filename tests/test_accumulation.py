"""A list of batches is one step: that of one large batch."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import steppe
from steppe.engine import sampling
from tests.cases import Case, N, assert_close, each_case_and_base, flat, optimizer, same_bits, scaler, sgd, sgdm, world
from tests.factored_models import EXAMPLES
from tests.models import Dropout

CUTS = (0, 4, 8, N)  # multiples of m, except the last


def chunks(batch: steppe.Batch, cuts=CUTS) -> list[steppe.Batch]:
    return [batch.subset(torch.arange(a, b)) for a, b in pairwise(cuts)]


@each_case_and_base
def test_accumulated_is_one_large_batch(case: Case, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name.startswith("sampled"):  # a draw lies within one accumulated batch: the same examples are put here
        of = lambda batch, m: steppe.batch.chunks_of(batch)[0] if m < 4 else batch  # noqa: E731
        monkeypatch.setattr(sampling, "drawn", lambda batch, m, *_: [(of(batch, m), torch.arange(1, 1 + m))])
    ours, theirs = world(), world()
    a, b = optimizer(case, ours, base), optimizer(case, theirs, base)
    cuts = (0, 5, N) if case.name == "micro of every" else CUTS  # its m is 5
    for split, whole in zip(ours.batches(2), theirs.batches(2), strict=True):
        loss = a.step(chunks(split, cuts))
        torch.testing.assert_close(loss, b.step(whole), rtol=1e-10, atol=1e-12)
    assert_close(ours, theirs, atol=1e-9, rtol=1e-8)


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
    opt = steppe.WSAM(sgd(w))
    opt.step(chunks(batch))
    assert most == [4]
    assert opt.telemetry.forwards == pytest.approx(2)


def test_micro_batches_of_a_batch_each() -> None:
    """m at the size of a batch is a perturbation for every batch, in shared passes or not."""
    for m in (4, 2):
        ours, theirs = world(), world()
        a = steppe.SAM(sgd(ours), rho=0.1, m=m, parallel=True)
        b = steppe.SAM(sgd(theirs), rho=0.1, m=m, parallel=False)
        a.step(chunks(ours.batch))
        b.step(theirs.batch)
        assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "combine"),
    [(name, steppe.Perturbed()) for name in ("mlp", "resnet", "gpt")] + [("mlp", steppe.Weighted(0.8))],
)
def test_rw_sam_weighs_the_examples_of_all_batches_by_exact_norms(name: str, combine) -> None:
    """One softmax over all of them; one batch's factors are held at a time."""
    found = []
    for accumulated in (True, False):
        model = EXAMPLES[name].model(torch.float64)
        base = sgdm(model)
        rule = steppe.Rule(steppe.Reweighted(3.0), combine=combine)
        opt = steppe.SharpnessAware(base, rule, 0.3, parallel=True)
        for k in range(2):
            batch = EXAMPLES[name].batch(model, N, torch.float64, seed=k)
            opt.step(chunks(batch, (0, 5, 6, N)) if accumulated else batch)
        g = 1 if isinstance(combine, steppe.Weighted) and accumulated else 0  # else from the pass of the norms
        assert opt.telemetry.forwards == pytest.approx(2 + g + accumulated)
        assert opt.telemetry.backwards == pytest.approx(2 + g + accumulated)
        found.append((flat(model), opt.telemetry))
    (ours, seen), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for number in ("loss", "loss_adv", "g_norm", "eps_norm", "g_adv_norm"):
        assert float(getattr(seen, number)) == pytest.approx(float(getattr(expected, number)), rel=1e-9), number


def test_a_round_for_norms_is_no_pass_that_counts() -> None:
    """The weighted gradient draws the masks that the norms were made with, and the statistics see each batch once."""

    torch.manual_seed(0)
    model, w = Dropout(8, nn.Tanh()).double(), world()
    opt = steppe.RWSAM(sgd(model), rho=0.1, parallel=True)
    parts = chunks(steppe.Batch.supervised(model, w.criterion, w.x, w.y))
    torch.manual_seed(1)
    opt.step(parts)
    norms, gradient, adv = (model.masks[-9:][i : i + 3] for i in (0, 3, 6))
    for a, b, c in zip(norms, gradient, adv, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(norms[0], norms[1])
    assert int(model.seen) == N
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for part in parts:
        part()
    assert torch.equal(after, torch.get_rng_state())


def test_exact_norms_of_scaled_batches() -> None:
    ours, theirs, s = world(), world(), scaler(256.0)
    a, b = (steppe.RWSAM(sgd(w), rho=0.1, parallel=True) for w in (ours, theirs))
    for _ in range(3):
        a.step(chunks(ours.batch), scaler=s)
        s.update()
        b.step(theirs.batch)
    assert s.get_scale() == 256.0
    assert_close(ours, theirs, atol=1e-10)


def test_one_batch_without_factors_takes_the_probe_for_all() -> None:
    """Norms of two kinds would not be comparable. No pass is made in vain, and ``parallel=True`` says why."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.slope = nn.Linear(5, 3), nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            y = self.a(x[:, :5]) * self.slope
            return y - y.mean(0) if x.shape[1] == 6 else y  # examples mix

    found = []
    for parallel in ("auto", False):
        torch.manual_seed(0)
        model, w = Net().double(), world()
        opt = steppe.RWSAM(sgd(model), rho=0.1, parallel=parallel)
        longer = nn.functional.pad(w.x, (0, 1))
        parts = [steppe.Batch.supervised(model, w.criterion, x, w.y) for x in (w.x, longer)]
        for _ in range(3):
            opt.step(parts)
        assert opt.telemetry.forwards == pytest.approx(4)
        found.append(list(model.parameters()))
    assert same_bits(*found)
    opt._stepper.parallel = True
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="example"):
        opt.step(parts)
    assert same_bits(before, list(model.parameters()))


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_statistics_and_gradient_noise_of_accumulated_batches(m: int, scaled: bool) -> None:
    w = world()
    s = scaler(256.0) if scaled else None
    accumulated = steppe.Batches(chunks(w.batch)).scaled_by(s)
    kept = w.parameters()[0].grad = torch.ones_like(w.parameters()[0])
    state = torch.get_rng_state()
    ours, theirs = (steppe.factored.gradient_statistics(b, m=m) for b in (accumulated, w.batch))
    assert torch.equal(state, torch.get_rng_state())
    assert w.parameters()[0].grad is kept
    for name in ("norms", "g_norm", "trace", "signal_to_noise"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    if m == 1:
        opt = steppe.GSAM(sgd(w), gradient_noise=True)
        opt.step(accumulated)
        torch.testing.assert_close(opt.telemetry.trace_V, theirs.trace)


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
    opt = steppe.GSAM(sgd(model), rho=0.1)
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
            steppe.WSAM(sgd(model)).step(parts)
        else:
            for part in parts:
                part()
    assert same_bits(list(models[0].buffers()), list(models[1].buffers()))


def test_scaled_accumulation() -> None:
    ours, theirs = world(), world()
    s = scaler(256.0)
    a = steppe.WSAM(sgd(ours))
    b = steppe.WSAM(sgd(theirs))
    a.step(chunks(ours.batch), scaler=s)
    s.update()
    b.step(chunks(theirs.batch))
    assert same_bits(ours.weights(), theirs.weights())


def test_bad_lists() -> None:
    w, other = world(), world()
    opt = steppe.SAM(sgd(w))
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


def test_zero_grad_and_modules_of_any_model() -> None:
    """Shared and missing modules, parameters that no optimizer has, a ``zero_grad`` of the model's own."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.none, self.scale = nn.Linear(5, 5), None, nn.Parameter(torch.ones(5))
            self.register_module("missing", None)
            self.register_parameter("nothing", None)
            self.twice = nn.ModuleList([self.a, nn.Sequential(self.a, nn.Linear(5, 3))])

    model = Odd()
    batch = steppe.Batch(model, lambda model, x: model.twice[1](x * model.scale).sum(1), torch.randn(4, 5))
    assert {id(m) for m in batch.modules()} == {id(m) for m in model.modules()}
    assert len(batch.modules()) == len(list(model.modules()))
    batch()
    assert all(p.grad is not None for p in model.parameters())
    batch.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    called = []
    model.zero_grad = lambda set_to_none=True: called.append(set_to_none)
    batch.zero_grad()
    assert called == [True]
