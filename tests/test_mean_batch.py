"""Batches whose loss is one mean: micro-batches without the losses of single examples."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import steppe
from steppe import Batch, MeanBatch
from steppe.engine import sampling
from tests.cases import METHODS, Case, N, World, assert_close, flat, same_bits, scaler, sgd, world

RHO = 0.3
ONE_MEAN = [c for c in METHODS if not c.looks_inside]
IGNORED = -100


def mean_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]), data[1], ignore_index=IGNORED)


def mean_of(batch: Batch, **options: object) -> MeanBatch:
    return MeanBatch(batch.model, mean_loss, batch.data, **options)


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


@pytest.mark.parametrize("options", [{}, {"m": 4}, {"m": 4, "sampled": 2}], ids=["whole", "m", "sampled"])
@pytest.mark.parametrize("case", ONE_MEAN, ids=lambda case: case.name)
def test_it_is_the_batch_of_single_losses(case: Case, options: dict[str, int]) -> None:
    ours, theirs = world(), world()
    a, b = (case.make(torch.optim.Adam(w.parameters(), lr=0.01), w, RHO) for w in (ours, theirs))
    b._stepper.parallel = False
    for opt in (a, b):
        opt.rule = steppe.Micro(options["m"], opt.rule, options.get("sampled")) if options else opt.rule
    for mine, batch in zip(ours.batches(3), theirs.batches(3), strict=True):
        torch.testing.assert_close(a.step(mean_of(mine)), b.step(batch), rtol=1e-12, atol=1e-12)
        assert a.telemetry.passes == pytest.approx(b.telemetry.passes)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def plain(w: World, batch: Batch, opt: torch.optim.Optimizer) -> Tensor:
    opt.zero_grad()
    loss = mean_loss(w.model, batch.data)
    loss.backward()
    opt.step()
    return loss.detach()


@pytest.mark.parametrize("options", [{"m": 5}, {"m": 1, "sampled": 1}, {"m": 5, "sampled": 2}], ids=str)
def test_a_radius_of_zero_is_the_plain_step_bit_for_bit(options: dict[str, int]) -> None:
    ours, theirs = world(torch.float32, noisy), world(torch.float32, noisy)
    opt, base = steppe.SAM(sgd(ours), 0.0, **options), sgd(theirs)
    for mine, batch in zip(ours.batches(4), theirs.batches(4), strict=True):
        torch.manual_seed(3)
        loss = opt.step(mean_of(mine))
        drawn = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(loss, plain(theirs, batch, base))
        assert torch.equal(drawn, torch.rand(3))
    assert same_bits(ours.parameters(), theirs.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.model.buffers(), theirs.model.buffers(), strict=True))


def test_a_perturbation_from_a_part() -> None:
    ours, theirs = world(), world()
    a, b = (steppe.SAM(sgd(w), RHO, ascent=2, parallel=False) for w in (ours, theirs))
    for mine, batch in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(mean_of(mine))
        b.step(batch)
    assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    data = masked(ours)
    data[1][1:] = IGNORED  # one example has tokens: the part is made of it
    opt = steppe.SAM(sgd(ours), RHO, ascent=1)
    opt.step(MeanBatch(ours.model, token_loss, data, weight=tokens))
    assert opt.telemetry.skipped == 0


def tokens(data: tuple[Tensor, Tensor]) -> Tensor:
    return (data[1] != IGNORED).sum()


def masked(w: World) -> tuple[Tensor, Tensor]:
    """Ten sentences of three tokens: seven labelled tokens in the first five, four in the others, one has none."""
    x = torch.randn(N, 3, 5, generator=torch.Generator().manual_seed(1), dtype=w.x.dtype)
    y = torch.randint(3, (N, 3), generator=torch.Generator().manual_seed(2))
    for i, k in enumerate([1, 3, 1, 1, 1, 0, 1, 1, 1, 1]):
        y[i, k:] = IGNORED
    return x, y


def token_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(data[0]).flatten(0, 1), data[1].flatten(), ignore_index=IGNORED)


def update_of(w: World, batch: Batch, rule: object) -> Tensor:
    f = steppe.SharpnessAware(sgd(w), rule, RHO)._stepper.oracle(batch)
    return torch.cat([t.flatten() for t in rule(f).grad.materialised()])


def by_hand(w: World, data: tuple[Tensor, Tensor], m: int) -> Tensor:
    """``sum_j tokens_j / tokens grad L_j(w + rho g_j / norm(g_j))``."""
    total, found = float(tokens(data)), torch.zeros(())
    for i in range(0, N, m):
        part, model = tuple(t[i : i + m] for t in data), copy.deepcopy(w.model)
        if not tokens(part):
            continue
        parameters = list(model.parameters())
        g = torch.autograd.grad(token_loss(model, part), parameters)
        norm = torch.cat([t.flatten() for t in g]).norm()
        with torch.no_grad():
            for p, t in zip(parameters, g, strict=True):
                p += RHO * t / norm
        u = torch.autograd.grad(token_loss(model, part), parameters)
        found = found + float(tokens(part)) / total * torch.cat([t.flatten() for t in u])
    return found


@pytest.mark.parametrize("m", [1, 4, 5])
def test_parts_weigh_by_their_tokens(m: int) -> None:
    w = world()
    batch = MeanBatch(w.model, token_loss, masked(w), weight=tokens)
    torch.testing.assert_close(update_of(w, batch, steppe.Micro(m)), by_hand(w, batch.data, m), rtol=1e-9, atol=1e-11)


def test_all_parts_of_one_are_m_sam_for_any_draw() -> None:
    w = world()
    batch = MeanBatch(w.model, token_loss, masked(w), weight=tokens)
    ours = update_of(w, batch, steppe.Micro(1, sampled=N))
    torch.testing.assert_close(ours, by_hand(w, batch.data, 1), rtol=1e-9, atol=1e-11)


def test_the_mean_over_draws_weighs_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world()
    batch = MeanBatch(w.model, token_loss, masked(w), weight=tokens)
    for m, weighs in ((1, N - 1), (2, N // 2)):  # the example without a token is not drawn
        parts = torch.arange(N).split(m)
        found = []
        for i in range(len(parts)):
            turned = (*parts[i:], *parts[:i])
            monkeypatch.setattr(sampling, "drawn", lambda b, *_, turned=turned: [(b, on) for on in turned])
            if tokens(tuple(t[parts[i]] for t in batch.data)):
                found.append(update_of(w, batch, steppe.Micro(m, sampled=1)))
        assert len(found) == weighs
        torch.testing.assert_close(torch.stack(found).mean(0), by_hand(w, batch.data, m), rtol=1e-9, atol=1e-11)


def test_numbers_of_draws_are_means_by_their_tokens() -> None:
    """All parts have perturbations of length rho, so their mean length is rho; memory is of the draws alone."""
    w = world()
    for seed in range(4):
        opt = steppe.SharpnessAware(sgd(w), steppe.Micro(3, steppe.Rule(), 2, seed), RHO)
        opt.step(MeanBatch(w.model, token_loss, masked(w), weight=tokens))
        assert float(opt.telemetry.eps_norm) == pytest.approx(RHO)


def test_accumulated_batches_without_a_token_are_refused() -> None:
    w = world()
    x, y = masked(w)
    nothing = MeanBatch(w.model, token_loss, (x, torch.full_like(y, IGNORED)), weight=tokens)
    before = w.weights()
    for rho in (RHO, 0.0):
        with pytest.raises(ValueError, match="weight must be above 0 for the data of the whole batch, got 0"):
            steppe.SAM(sgd(w), rho).step([nothing, nothing])
    assert same_bits(before, w.parameters())


def test_an_accumulated_batch_without_a_token_is_left_out_where_g_is_made_of_the_draws() -> None:
    w = world()
    x, y = masked(w)
    whole = MeanBatch(w.model, token_loss, (x, y), weight=tokens)
    nothing = MeanBatch(w.model, token_loss, (x, torch.full_like(y, IGNORED)), weight=tokens)
    opt = steppe.SAM(sgd(w), RHO, m=N, sampled=1)
    opt.step([whole, nothing])
    assert opt.telemetry.skipped == 0
    assert float(opt.telemetry.eps_norm) == pytest.approx(RHO)


@pytest.mark.parametrize("rule", [steppe.Rule(), steppe.Micro(2), steppe.Plain()], ids=["SAM", "m", "plain"])
def test_accumulated_means_are_one_mean(rule: object) -> None:
    w = world()
    whole = MeanBatch(w.model, token_loss, masked(w), weight=tokens)
    cut = steppe.Batches([whole.subset(torch.arange(a, b)) for a, b in pairwise((0, 4, 6, N))])
    torch.testing.assert_close(update_of(w, cut, rule), update_of(w, whole, rule), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(cut(), whole(), rtol=1e-12, atol=1e-12)
    nothing = steppe.Batches([whole.subset(torch.tensor([5])), whole])  # without a token, whose mean is NaN
    assert torch.isfinite(update_of(w, nothing, rule)).all()


def test_a_scaler_gives_the_same_bits() -> None:
    ours, theirs = world(torch.float32), world(torch.float32)
    a, b = (steppe.SAM(sgd(w), RHO, m=4, sampled=1) for w in (ours, theirs))
    s = scaler()
    for mine, batch in zip(ours.batches(3), theirs.batches(3), strict=True):
        a.step(mean_of(mine, scaler=s))
        s.update()
        b.step(mean_of(batch))
    assert same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda base: steppe.RWSAM(base), "RWSAM"),
        (lambda base: steppe.ESAM(base), "ESAM"),
        (lambda base: steppe.RWSAM(base, m=5), "m-RWSAM"),
        (lambda base: steppe.ESAM(base, m=5, sampled=1), "sampled ESAM"),
        (lambda base: steppe.SAM(base, gradient_noise=True), "noise"),
    ],
)
def test_what_needs_the_losses_of_single_examples_is_refused(make, name: str) -> None:
    w = world()
    opt, before = make(sgd(w)), w.weights()
    with pytest.raises(TypeError, match=r"a MeanBatch has one loss for all: pass a steppe\.Batch"):
        opt.step(mean_of(w.batch))
    assert same_bits(before, w.parameters())
    assert not opt.state


def test_other_mistakes_are_named() -> None:
    w = world()
    with pytest.raises(TypeError, match="MeanBatch has one loss for all"):
        steppe.factored.gradient_statistics(mean_of(w.batch))
    with pytest.raises(TypeError, match="MeanBatch has one loss for all"):
        mean_of(w.batch).losses()
    with pytest.raises(ValueError, match=r"loss must return the mean loss.*shape \(10,\)"):
        steppe.SAM(sgd(w)).step(MeanBatch(w.model, lambda model, d: w.criterion(model(d[0]), d[1]), w.batch.data))
    with pytest.raises(ValueError, match="on a MeanBatch"):
        steppe.SAM(sgd(w), m=5, parallel=True).step(mean_of(w.batch))
    with pytest.raises(TypeError, match="weight must be a function"):
        mean_of(w.batch, weight=3)
    with pytest.raises(ValueError, match="weight must return a finite number >= 0, got -1"):
        steppe.SAM(sgd(w), m=5).step(mean_of(w.batch, weight=lambda data: -1))
    with pytest.raises(ValueError, match="weight must be above 0 for the data of the whole batch"):
        steppe.SAM(sgd(w), m=5).step(mean_of(w.batch, weight=lambda data: 0))
    with pytest.raises(ValueError, match="all a Batch, or all a MeanBatch"):
        steppe.Batches([w.batch, mean_of(w.batch)])


def contrastive(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Texts and images of one batch are compared with one another."""
    z = nn.functional.normalize(model(data[0]), dim=1)
    return nn.functional.cross_entropy(z @ z.T.roll(1, 0) * 10, torch.arange(len(z)))


def test_parts_that_do_not_add_up_are_told_once() -> None:
    w = world()
    opt = steppe.SAM(sgd(w), RHO, m=5)
    with pytest.warns(UserWarning, match="not the weighted mean of its parts' losses.*contrastive") as seen:
        opt.step(MeanBatch(w.model, contrastive, w.batch.data))
    assert len(seen) == 1
    opt.step(MeanBatch(w.model, contrastive, w.batch.data))  # a second warning would be an error
    with pytest.warns(UserWarning, match=r"pass weight=, the number of tokens"):
        steppe.SAM(sgd(w), RHO, m=5).step(MeanBatch(w.model, token_loss, masked(w)))


def test_parts_that_add_up_are_not_warned_about() -> None:
    """Dropout and batch statistics, which differ from part to part, are no reason."""
    w = world(torch.float32, noisy)
    modes = [m.training for m in w.model.modules()]
    buffers = copy.deepcopy(dict(w.model.named_buffers()))
    other = copy.deepcopy(w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        steppe.SAM(sgd(w), RHO, m=5).step(mean_of(w.batch))
        mine = torch.rand(1)
    torch.manual_seed(0)
    steppe.SAM(sgd(other), RHO, m=5, parallel=False).step(other.batch)
    assert torch.equal(mine, torch.rand(1))
    torch.testing.assert_close(flat(w.model), flat(other.model))
    assert [m.training for m in w.model.modules()] == modes
    assert all(not torch.equal(b, buffers[n]) for n, b in w.model.named_buffers())


class Detector(nn.Module):
    """Images of several sizes and lists of targets, as torchvision's detectors take them; a loss in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images, targets=None):
        assert self.training, "in evaluation there are no losses"
        assert len(images) == len(targets)
        return {
            "boxes": torch.stack(
                [
                    (self.layer(image.mean((1, 2))) - target["boxes"].mean(0)).square().mean()
                    for image, target in zip(images, targets, strict=True)
                ]
            ).mean()
        }


@pytest.mark.parametrize("options", [{"m": 1}, {"m": 2, "sampled": 1}, {"m": 3}], ids=str)
def test_detection(options: dict[str, int]) -> None:
    torch.manual_seed(0)
    images = tuple(torch.randn(3, 4 + i, 5) for i in range(6))
    targets = tuple({"boxes": torch.randn(i + 1, 4), "labels": torch.ones(i + 1)} for i in range(6))
    model = Detector()
    opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.05, **options)
    batch = MeanBatch(model, lambda model, data: sum(model(*data).values()), (images, targets))
    first = float(opt.step(batch))
    for _ in range(20):
        last = float(opt.step(batch))
    assert last < first
    assert opt.telemetry.steps == 21


def test_a_bias_of_the_batch_stays_whole() -> None:
    w = world()
    loss = lambda model, d: d["scale"] * nn.functional.cross_entropy(model(d["x"]), d["y"])  # noqa: E731
    data = {"x": w.x, "y": w.y, "scale": torch.tensor(2.0, dtype=torch.float64), "mask": None}
    ours = update_of(w, MeanBatch(w.model, loss, data), steppe.Micro(5))
    torch.testing.assert_close(ours, 2 * update_of(w, w.batch, steppe.Micro(5)), rtol=1e-9, atol=1e-11)
