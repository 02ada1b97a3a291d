"""Sharded parameters (``fully_shard``): one perturbation for all ranks, equal to one process on the whole batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import steppe
from steppe.engine import sampling
from tests.cases import sgd
from tests.distributed.test_ddp import NAMES, B, batch_of, data, net, share, weights


def sharded(**policies) -> nn.Module:
    model = net()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh, **policies)
    return fully_shard(model, mesh=mesh, **policies)


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]


def make(name: str, model: nn.Module, **options):
    base = torch.optim.AdamW(model.parameters(), lr=0.05)
    if name.startswith("Joint "):
        name = name.removeprefix("Joint ")
        matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == two] for two in (True, False))
        base = steppe.Joint([sgd(matrices, lr=0.1, momentum=0.9), torch.optim.AdamW(rest, lr=0.05)])
    if name == "XSAM":
        options["every"] = 1
    if name == "NSAM":
        x, y = data(1000)
        if distributed.is_initialized():
            x, y = share(x), share(y)
        options["full"] = batch_of(model, x, y)
    return getattr(steppe, name)(base, rho=0.3, **options)


def train(name: str, closure: bool, options: dict, policies: dict | None = None, split: bool = False):
    warnings.filterwarnings("error")
    model = sharded(**(policies or {}))
    optimizer = make(name, model, **options)
    for step in range(3):
        x, y = map(share, data(step))
        batch = batch_of(model, x, y)
        if split:
            batch = [batch_of(model, x[:3], y[:3]), batch_of(model, x[3:], y[3:])]
        optimizer.step((lambda batch=batch: batch()) if closure else batch)
    return whole(model), norm_of(optimizer), optimizer.telemetry.forwards


def replicated(name: str, options: dict):
    model = DistributedDataParallel(net())
    optimizer = make(name, model, sync="global", **options)
    for step in range(3):
        optimizer.step(batch_of(model, *map(share, data(step))))
    return weights(model)


def alone(name: str, options: dict):
    model = net()
    optimizer = make(name, model, **options)
    for step in range(3):
        optimizer.step(batch_of(model, *data(step)))
    return weights(model), norm_of(optimizer)


def norm_of(optimizer) -> float:
    """The norm of the gradient at w; of MomentumSAM, which has none there, at w + eps."""
    seen = optimizer.telemetry
    return float(seen.g_adv_norm if seen.g_norm is None else seen.g_norm)


def assert_close(ours, expected, tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CHOICES = [
    ("RWSAM", {"parallel": False}),
    ("ReweightedSharpness", {"parallel": False, "size": 2}),
    ("ESAM", {"gamma": 0.5, "beta": 1.0}),
]
WITHIN_A_RANK = ("RWSAM", "ReweightedSharpness", "ESAM")  # these choose or weigh its examples
CLOSURES = ("SAM", "WSAM", "NSAM", "LookSAM", "MomentumSAM")  # whatever the method, the passes are the same


@pytest.mark.parametrize(
    ("name", "closure"),
    [(n, False) for n in NAMES if n not in WITHIN_A_RANK] + [(n, True) for n in CLOSURES],
)
def test_sharded_is_the_whole_batch_on_one(two_ranks, name, closure) -> None:
    expected, norm = alone(name, {"parallel": False})
    for ours, g_norm, _ in two_ranks(train, name, closure, {}):
        assert_close(ours, expected)
        assert g_norm == pytest.approx(norm, rel=1e-10)  # not of this rank's shards alone


@pytest.mark.parametrize(("name", "options"), CHOICES)
def test_choices_within_a_rank_are_those_of_shared_replicas(two_ranks, name, options) -> None:
    """Forwards without a backward between moves: gathered weights must not be used again."""
    expected, _ = two_ranks(replicated, name, options)
    for ours, *_ in two_ranks(train, name, False, options):
        assert_close(ours, expected)


def test_the_mask_of_esam_is_that_of_one_process(two_ranks) -> None:
    expected, _ = alone("ESAM", {"gamma": 1.0, "beta": 0.5})
    for ours, *_ in two_ranks(train, "ESAM", False, {"gamma": 1.0, "beta": 0.5}):
        assert_close(ours, expected)


@pytest.mark.parametrize("name", ["SAM", "WSAM"])
def test_accumulation_and_clipping(two_ranks, name) -> None:
    expected, _ = alone(name, {"parallel": False, "max_norm": 0.2})
    for ours, *_ in two_ranks(train, name, False, {"max_norm": 0.2}, {}, True):
        assert_close(ours, expected)


def test_micro_batches_share_their_perturbation_across_ranks(two_ranks) -> None:
    """Of two examples a rank here: a shard cannot move for one rank alone."""
    model = net()
    optimizer = make("SAM", model, m=4, parallel=False)
    for step in range(3):
        x, y = data(step)
        order = torch.arange(2 * B).view(2, -1, 2).transpose(0, 1).reshape(-1)
        optimizer.step(batch_of(model, x[order], y[order]))
    for ours, _, forwards in two_ranks(train, "SAM", False, {"m": 2, "parallel": False}):
        assert forwards == 2
        assert_close(ours, weights(model))


@pytest.mark.parametrize("part", [{"m": 2, "sampled": 1}, {"ascent": 2}], ids=["sampled", "ascent"])
def test_a_draw_is_of_all_ranks_together(two_ranks, monkeypatch, part) -> None:
    """Equal indices on all ranks, of their own examples: so ranks that split a layer between them draw the same."""
    indices = steppe.Batch(nn.Identity(), lambda *_: None, torch.arange(B))
    real = sampling.drawn

    def both(batch: steppe.Batch, *draw) -> list[sampling.Draw]:
        return [(batch, torch.cat([on, B + on])) for _, on in real(indices, *draw)]

    monkeypatch.setattr(sampling, "drawn", both)
    expected, _ = alone("SAM", part | {"parallel": False})
    for ours, _, forwards in two_ranks(train, "SAM", False, part | {"parallel": False}):
        assert_close(ours, expected)
        assert forwards == pytest.approx(1 + (2 if "m" in part else 1) * 2 / B)


def test_perturbations_of_single_ranks_are_refused(two_ranks) -> None:
    with pytest.raises(AssertionError, match="sync must be 'auto' or 'global' for sharded parameters, got 'local'"):
        two_ranks(train, "SAM", False, {"sync": "local"})


def train_low(offload: bool):
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = (
        sharded(mp_policy=low).float() if not offload else sharded(offload_policy=CPUOffloadPolicy(pin_memory=False))
    )
    optimizer = make("WSAM", model)
    kept = [p.full_tensor().detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(30):
        x, y = map(share, data(0))
        losses.append(float(optimizer.step(batch_of(model, x if offload else x.float(), y))))
    moved = all(not torch.equal(a, b) for a, b in zip(kept, whole(model), strict=True))
    return losses, moved, {p.dtype for p in model.parameters()}


@pytest.mark.parametrize("offload", [False, True])
def test_policies_of_precision_and_offloading(two_ranks, offload) -> None:
    for losses, moved, dtypes in two_ranks(train_low, offload):
        assert moved
        assert losses[-1] < 0.5 * losses[0]
        assert dtypes == {torch.float64 if offload else torch.float32}


def skip_one(_):
    model = sharded()
    optimizer = make("GSAM", model)
    x, y = map(share, data(0))
    before = whole(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step(batch_of(model, x * torch.inf if distributed.get_rank() else x, y))
    same = all(torch.equal(a, b) for a, b in zip(before, whole(model), strict=True))
    return same, optimizer.telemetry.was_skipped


def test_all_ranks_skip(two_ranks) -> None:
    assert two_ranks(skip_one, None) == [(True, True)] * 2


def flat(original: bool):
    model = FullyShardedDataParallel(net(), use_orig_params=original, device_id=torch.device("cpu"))
    try:
        steppe.SAM(sgd(model)).step(batch_of(model, *data(0)))
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [False, True])
def test_flattened_parameters_are_refused(two_ranks, original) -> None:
    for said in two_ranks(flat, original):
        assert "fully_shard" in said


def start_and_save(name: str, path: str):
    model = sharded() if distributed.is_initialized() else net()
    optimizer = make(name, model)
    steps(model, optimizer, range(3))
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.save(states, checkpoint_id=path)


def load_and_go_on(name: str, path: str):
    model = sharded() if distributed.is_initialized() else net()
    optimizer = make(name, model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    checkpoint.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    steps(model, optimizer, range(3, 6))
    return whole(model) if distributed.is_initialized() else weights(model)


def steps(model, optimizer, which) -> None:
    for step in which:
        x, y = data(step)
        optimizer.step(batch_of(model, share(x), share(y)) if distributed.is_initialized() else batch_of(model, x, y))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SAM", "WSAM", "FSAM", "VaSSO", "LookSAM", "AESAM", "MomentumSAM", "Joint FSAM"])
def test_checkpoints_cross_between_one_process_and_two(two_ranks, tmp_path, name) -> None:
    model = net()
    optimizer = make(name, model)
    steps(model, optimizer, range(6))
    start_and_save(name, str(tmp_path / "one"))
    two_ranks(start_and_save, name, str(tmp_path / "two"))
    assert_close(load_and_go_on(name, str(tmp_path / "two")), weights(model))
    for ours in two_ranks(load_and_go_on, name, str(tmp_path / "one")):
        assert_close(ours, weights(model))


def labels_of_ranks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels and the weight of a label, for examples of two ranks: shape (B, 2); rank 1 has few labels."""
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(B, 2, 5, generator=g, dtype=torch.float64), torch.randint(3, (B, 2), generator=g)
    y[4:6, 0] = y[2:, 1] = -100
    known = (y != -100).double()
    return x, y, known / known.sum(0)


def mean_of_labels(model: nn.Module, d: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(d[0]), d[1])


def weighted_mean_of_labels(model: nn.Module, d: tuple[torch.Tensor, ...]) -> torch.Tensor:
    losses = nn.functional.cross_entropy(model(d[0]).flatten(0, 1), d[1].flatten(), reduction="none")
    return losses @ d[2].flatten() / d[2].sum()


def count_labels(d: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return (d[1] != -100).sum()


def steps_on_labels(optimizer, batch: steppe.MeanBatch, split: bool) -> tuple[float, float]:
    parts = [batch.subset(torch.arange(i, i + 4)) for i in range(0, B, 4)] if split else batch
    for _ in range(3):
        optimizer.step(parts)
    return float(optimizer.telemetry.eps_norm), optimizer.telemetry.forwards


def train_on_labels(name: str, options: dict, split: bool):
    warnings.filterwarnings("error")
    model, rank = sharded(), distributed.get_rank()
    x, y, _ = labels_of_ranks()
    batch = steppe.MeanBatch(model, mean_of_labels, (x[:, rank], y[:, rank]), weight=count_labels)
    seen = steps_on_labels(make(name, model, **options), batch, split)
    return whole(model), *seen


PARTS = ({}, {"m": 2}, {"m": 4}, {"m": 2, "sampled": 1}, {"m": 4, "sampled": 1})


@pytest.mark.parametrize("split", [False, True], ids=["one", "list"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("SAM", part) for part in PARTS] + [(name, part) for name in ("WSAM", "FSAM") for part in (PARTS[1], PARTS[4])],
)
def test_parts_without_a_label_on_some_ranks(two_ranks, name: str, options: dict, split: bool) -> None:
    """One process with the examples of both ranks, whose labels weigh 1 / (the labels of their rank)."""
    model = net()
    batch = steppe.MeanBatch(model, weighted_mean_of_labels, labels_of_ranks(), weight=lambda d: d[2].sum())
    eps_norm, _ = steps_on_labels(make(name, model, **options), batch, split)
    for ours, norm, _ in two_ranks(train_on_labels, name, options, split):
        assert_close(ours, weights(model))
        assert norm == pytest.approx(eps_norm, rel=1e-8)


def refuse_no_label(options: dict, split: bool) -> str:
    model, rank = sharded(), distributed.get_rank()
    x, y, _ = labels_of_ranks()
    labels = y[:, rank] if rank == 0 else torch.full((B,), -100)
    batch = steppe.MeanBatch(model, mean_of_labels, (x[:, rank], labels), weight=count_labels)
    with pytest.raises(ValueError, match="weight must be above 0") as error:
        steps_on_labels(make("SAM", model, **options), batch, split)
    return str(error.value)


@pytest.mark.parametrize(("options", "split"), [({"m": 2}, False), ({}, True)], ids=["m", "list"])
def test_a_rank_without_a_label_is_refused_on_all(two_ranks, options: dict, split: bool) -> None:
    mine, theirs = two_ranks(refuse_no_label, options, split)
    assert "got 0 on another rank" in mine
    assert "got 0:" in theirs
