"""DistributedDataParallel: whose gradients make the perturbation, and that replicas stay equal."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import steppe
from steppe.engine import outgrown, sampling
from steppe.pieces.protocol import Declaration
from tests.cases import same_bits, scaler
from tests.models import Branches

LONGER = int(os.environ.get("STEPPE_SOAK", "1"))
B = 8  # examples of a rank


class Counted:
    """How often gradients are averaged: by DDP in its backward passes, and by steppe."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self.by_ddp = self.by_hand = self.small = 0
        ddp.register_comm_hook(None, self._hook)

    def _hook(self, _state, bucket):
        self.by_ddp += bucket.is_last()
        work = distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    @contextmanager
    def counting(self):
        real = distributed.all_reduce

        def counted(tensor, *args, **kwargs):
            if not kwargs.get("async_op"):
                if tensor.is_floating_point():
                    self.by_hand += 1
                else:
                    self.small += 1
            return real(tensor, *args, **kwargs)

        distributed.all_reduce = counted
        try:
            yield
        finally:
            distributed.all_reduce = real


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch, of all ranks."""
    g = torch.Generator().manual_seed(step)
    n = B * distributed.get_world_size() if distributed.is_initialized() else B * 2
    return torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)


def share(t: torch.Tensor) -> torch.Tensor:
    return t.chunk(distributed.get_world_size())[distributed.get_rank()]


def batch_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> steppe.Batch:
    return steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)


def make(name: str, model: nn.Module, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    method = getattr(steppe, name)
    if name == "NSAM":
        x, y = data(1000)
        if options.get("sync") == "global":
            x, y = share(x), share(y)
        options["full"] = batch_of(model, x, y)
    if name == "ESAM":
        options["gamma"] = 1.0  # its selection is each rank's own
    if name == "ReweightedSharpness":
        options["size"] = 2
    if name == "XSAM":
        options["every"] = 1
    if name == "PreconditionedSAM":
        base = torch.optim.Adam(model.parameters(), lr=1e-2)
    return method(base, rho=0.3, **options)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(name: str, options: dict, steps: int = 4, closure: bool = False, ddp_options: dict | None = None):
    model = DistributedDataParallel(net(), **(ddp_options or {}))
    counted = Counted(model)
    optimizer = make(name, model, **options)
    for step in range(steps):
        batch = batch_of(model, *map(share, data(step)))
        with counted.counting():
            if closure:

                def plain(batch=batch):
                    optimizer.zero_grad()
                    loss = batch.losses().mean()
                    loss.backward()
                    return loss

                optimizer.step(plain)
            else:
                optimizer.step(batch)
    memory = [t for s in optimizer.state.values() for k, t in sorted(s.items()) if isinstance(t, torch.Tensor)]
    return weights(model), memory, (counted.by_ddp / steps, counted.by_hand / steps), optimizer.telemetry.forwards


def alone(name: str, options: dict, steps: int = 4) -> list[torch.Tensor]:
    """One process on the whole batch."""
    model = net()
    optimizer = make(name, model, **options)
    for step in range(steps):
        optimizer.step(batch_of(model, *data(step)))
    return weights(model)


NAMES = [method.__name__ for method in steppe.METHODS]
SHARED_SOFTMAX = {"RWSAM", "ReweightedSharpness"}  # weights are each rank's own: as under m=, not as on the whole batch


@pytest.mark.parametrize("name", NAMES)
def test_local_on_two_ranks_is_m_sam_on_one(two_ranks, name) -> None:
    expected = alone(name, {"m": B})
    (mine, memory, _, _), (theirs, other_memory, _, _) = two_ranks(train, name, {"sync": "local"})
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(memory, other_memory, strict=True))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SHARED_SOFTMAX])
def test_global_on_two_ranks_is_the_whole_batch_on_one(two_ranks, name) -> None:
    expected = alone(name, {"parallel": False})
    (mine, memory, _, _), (theirs, other_memory, _, _) = two_ranks(train, name, {"sync": "global"})
    assert all(torch.equal(a, b) for a, b in zip(mine + memory, theirs + other_memory, strict=True))
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_rw_sam_and_esam_weigh_and_choose_within_a_rank(two_ranks) -> None:
    """Also where the perturbation is shared: a softmax, or a share gamma, over each rank's own examples."""
    for sync in ("local", "global"):
        for name, options in [("RWSAM", {}), ("ESAM", {"gamma": 0.5})]:
            (mine, *_), (theirs, *_) = two_ranks(train_as_is, name, {"sync": sync, **options})
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    (mine, *_), _ = two_ranks(train_as_is, "ESAM", {"sync": "local", "gamma": 0.5})
    model = net()
    optimizer = steppe.ESAM(sgd(model), rho=0.3, gamma=0.5, m=B)
    for step in range(2):
        optimizer.step(batch_of(model, *data(step)))
    for a, b in zip(mine, weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    expected = _rw_sam_by_hand()
    (mine, *_), _ = two_ranks(train_as_is, "RWSAM", {"sync": "global", "lam": 2.0}, 1)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def train_as_is(name: str, options: dict, steps: int = 2):
    model = DistributedDataParallel(net())
    optimizer = getattr(steppe, name)(sgd(model), rho=0.3, **options)
    for step in range(steps):
        optimizer.step(batch_of(model, *map(share, data(step))))
    return weights(model), optimizer.telemetry


@pytest.mark.parametrize("sync", ["global", 2])
def test_ranks_that_share_gradients_go_the_same_way(two_ranks, sync) -> None:
    """One rank cannot take the norms of its examples, then the other one cannot weigh its gradients: both probe."""
    (mine, seen), (theirs, other_seen) = two_ranks(train_in_trouble, {"sync": sync})
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [t.forwards for t in seen] == [t.forwards for t in other_seen]
    assert [t.forwards > 2 for t in seen] == [False, True, True, False]


def train_in_trouble(options: dict):
    from steppe.factored.collect import Recorded

    model = DistributedDataParallel(net())
    optimizer = steppe.RWSAM(sgd(model), rho=0.3, **options)
    trouble = {1: (1, "norms"), 2: (0, "weighted")}  # step: rank, what fails there
    seen = []
    for step in range(4):
        rank, method = trouble.get(step, (None, "weighted"))
        real = getattr(Recorded, method)
        if rank == distributed.get_rank():
            setattr(Recorded, method, _no_memory)
        optimizer.step(batch_of(model, *map(share, data(step))))
        setattr(Recorded, method, real)
        seen.append(optimizer.telemetry)
    return weights(model), seen


def _no_memory(*_):
    raise RuntimeError("out of memory")


def _rw_sam_by_hand() -> list[torch.Tensor]:
    """d = mean over ranks of sum_i p_i g_i, p a softmax within the rank; one SGD step with the mean's g_adv."""
    model = net()
    x, y = data(0)
    parameters = list(model.parameters())

    def gradient(a, b, p=None):
        losses = nn.functional.cross_entropy(model(x[a:b]), y[a:b], reduction="none")
        return torch.autograd.grad(losses.mean() if p is None else losses @ p, parameters)

    d = [torch.zeros_like(p) for p in parameters]
    for rank in range(2):
        each = [gradient(i, i + 1) for i in range(rank * B, rank * B + B)]
        norms = torch.stack([torch.cat([t.flatten() for t in g]).norm() for g in each])
        p = torch.softmax(2.0 * norms, 0)
        for k, t in enumerate(gradient(rank * B, rank * B + B, p)):
            d[k] += t / 2
    norm = torch.cat([t.flatten() for t in d]).norm()
    start = weights(model)
    with torch.no_grad():
        for w, t in zip(parameters, d, strict=True):
            w += 0.3 * t / norm
    g_adv = gradient(0, 2 * B)
    return [w - 0.1 * (g + 1e-3 * w) for w, g in zip(start, g_adv, strict=True)]


ALL_REDUCES = {  # of gradients, a step: by DDP in a backward pass, by steppe after the passes
    ("SAM", "local"): (1, 0),
    ("SAM", "global"): (2, 0),
    ("ASAM", "local"): (1, 0),
    ("WSAM", "local"): (0, 2),  # its two parts are averaged each
    ("WSAM", "global"): (2, 0),
    ("CoupledWSAM", "local"): (0, 1),
    ("GSAM", "local"): (0, 1),
    ("FSAM", "local"): (1, 1),  # and its memory
    ("FSAM", "global"): (2, 0),
    ("ESAM", "global"): (1, 1),  # the masked pass is not DDP's
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("name", "sync"), ALL_REDUCES)
def test_no_gradient_is_averaged_twice(two_ranks, name, sync, closure) -> None:
    expected = ALL_REDUCES[name, sync]
    for _, _, (by_ddp, by_hand), forwards in two_ranks(train, name, {"sync": sync}, 4, closure):
        in_one_message = 1 if expected[1] else 0
        assert (by_ddp, by_hand) == (expected[0], in_one_message)
        assert forwards == 2


@pytest.mark.parametrize(
    ("name", "part", "messages", "forwards"),
    [
        ("SAM", {"m": 2, "sampled": 1, "parallel": False}, (0, 1), 1.5),
        ("SAM", {"m": 2, "sampled": 1}, (0, 1), 1.25),
        ("SAM", {"m": 2, "sampled": 1, "clip": 0.5}, (0, 1), 1.25),
        ("SAM", {"ascent": 2}, (1, 0), 1.25),
        ("WSAM", {"ascent": 2}, (0, 1), 2.25),
    ],
)
def test_sampled_gradients_are_averaged_once(two_ranks, name, part, messages, forwards) -> None:
    (mine, memory, *counts), (theirs, other, *_) = two_ranks(train, name, part)
    assert counts == [messages, forwards]
    assert same_bits(mine + memory, theirs + other)


def test_the_parts_of_g_are_its_pass_under_ddp(two_ranks) -> None:
    part = {"m": 2, "sampled": 1}
    (ours, *_), (theirs, *_) = (two_ranks(train, "WSAM", part | more)[0] for more in ({}, {"parallel": False}))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "static_graph": True},
        {"bucket_cap_mb": 1e-4},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "sync"),
    [("SAM", "local"), ("SAM", "global"), ("WSAM", "local"), ("WSAM", "global"), ("LookSAM", "local")],
)
def test_options_of_ddp_change_nothing(two_ranks, name, sync, options) -> None:
    expected = without_options(two_ranks, name, sync)
    for got, *_ in two_ranks(train, name, {"sync": sync}, 4, False, options):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@cache
def without_options(two_ranks, name: str, sync: str) -> list[torch.Tensor]:
    return two_ranks(train, name, {"sync": sync})[0][0]


def branches() -> Branches:
    """Each rank uses a branch of its own, and one branch nobody uses."""
    torch.manual_seed(3)
    made = [nn.Linear(4, 3) for _ in range(3)]
    return Branches(made, nn.Sequential(nn.Linear(5, 4), nn.Tanh()), [[distributed.get_rank()]])


def train_branches(name: str, sync: str):
    model = DistributedDataParallel(branches().double(), find_unused_parameters=True)
    start = weights(model)
    base = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = getattr(steppe, name)(base, rho=0.3, sync=sync)
    for step in range(3):
        optimizer.step(batch_of(model, *map(share, data(step))))
    unused = list(model.module.branches[2].parameters())
    untouched = all(torch.equal(a, b) for a, b in zip(unused, start[-2:], strict=True))
    return weights(model), untouched, len(optimizer.state)


@pytest.mark.parametrize("name", ["SAM", "WSAM", "FSAM", "GSAM"])
@pytest.mark.parametrize("sync", ["local", "global"])
def test_ranks_may_use_different_parameters(two_ranks, name, sync) -> None:
    (mine, untouched, states), (theirs, *_) = two_ranks(train_branches, name, sync)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert untouched  # what no rank uses is not decayed
    assert states == 6


def train_grouped(name: str, sync: int):
    model = DistributedDataParallel(net())
    optimizer = make(name, model, sync=sync)
    for step in range(3):
        optimizer.step(batch_of(model, *map(share, data(step))))
    return weights(model)


@pytest.mark.parametrize("name", ["SAM", "WSAM", "GSAM"])
def test_two_of_four_ranks_share_a_perturbation(four_ranks, name) -> None:
    everyone = four_ranks(train_grouped, name, 2)
    model = net()
    optimizer = make(name, model, m=2 * B)
    for step in range(3):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(4 * B, 5, generator=g, dtype=torch.float64), torch.randint(3, (4 * B,), generator=g)
        optimizer.step(batch_of(model, x, y))
    for got in everyone:
        for a, b, c in zip(got, everyone[0], weights(model), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)


def test_ranks_that_cannot_be_grouped(four_ranks) -> None:
    with pytest.raises(AssertionError, match="sync must divide the number of ranks, 4, got 3"):
        four_ranks(train_grouped, "SAM", 3)


def train_with_a_bad_rank(name: str, sync: str, scaled: bool):
    model = DistributedDataParallel(net())
    s = scaler(4.0) if scaled else None
    optimizer = make(name, model, sync=sync)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3):
            x, y = map(share, data(step))
            if step == 1 and distributed.get_rank() == 1:
                x = x * torch.inf
            before = weights(model)
            batch = batch_of(model, x, y)
            optimizer.step(batch.scaled_by(s))
            if s is not None:
                s.update()
            moved = any(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
            seen.append((moved, optimizer.telemetry.was_skipped, s.get_scale() if scaled else None))
    return weights(model), seen


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize("name", ["SAM", "WSAM", "GSAM", "FSAM"])
def test_all_ranks_skip_what_one_must_skip(two_ranks, name, sync, scaled) -> None:
    (mine, seen), (theirs, others) = two_ranks(train_with_a_bad_rank, name, sync, scaled)
    assert seen == others
    assert [moved for moved, _, _ in seen] == [True, False, True]
    assert [skipped for _, skipped, _ in seen] == [False, True, False]
    if scaled:
        assert [scale for *_, scale in seen] == [4.0, 2.0, 2.0]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", ["SAM", "WSAM", "RWSAM"])
def test_shared_passes_on_every_rank(two_ranks, name) -> None:
    expected = alone(name, {"m": 2, "parallel": True})
    for got, _, (by_ddp, by_hand), forwards in two_ranks(train, name, {"m": 2, "parallel": True}):
        assert forwards == 2
        assert (by_ddp, by_hand) == (0, 1)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def train_accumulated(name: str, options: dict):
    model = DistributedDataParallel(net())
    counted = Counted(model)
    optimizer = getattr(steppe, name)(sgd(model), rho=0.3, **options)
    for step in range(3):
        x, y = map(share, data(step))
        chunks = [batch_of(model, x[a:b], y[a:b]) for a, b in ((0, 3), (3, 5), (5, 8))]
        with counted.counting():
            optimizer.step(chunks)
    return weights(model), (counted.by_ddp / 3, counted.by_hand / 3)


@pytest.mark.parametrize(("name", "counts"), [("SAM", (2, 0)), ("WSAM", (2, 0)), ("GSAM", (2, 0))])
def test_accumulation_averages_once_a_pass(two_ranks, name, counts) -> None:
    expected = list(alone(name, {}, 3))
    for got, counted in two_ranks(train_accumulated, name, {"sync": "global"}):
        assert counted == counts
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sync", ["local", "global"])
def test_exact_norms_of_accumulated_batches_are_taken_without_messages(two_ranks, sync) -> None:
    """The same as those of a rank's one batch, whoever shares the weighted gradient."""
    options = {"sync": sync, "parallel": True}
    whole = two_ranks(train, "RWSAM", options, 3)
    for (got, counted), (expected, _, (by_ddp, by_hand), _) in zip(
        two_ranks(train_accumulated, "RWSAM", options), whole, strict=True
    ):
        assert counted == ((2, 0) if sync == "global" else (1, 0))
        assert by_ddp + by_hand == sum(counted)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def train_normalised(steppes: bool, name: str = "SAM"):
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double())
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = getattr(steppe, name)(base, rho=0.3) if steppes else base
    for step in range(4):
        batch = batch_of(model, *map(share, data(step)))
        if steppes:
            optimizer.step(batch)
        else:
            batch()
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("name", ["SAM", "WSAM", "LookSAM"])
def test_statistics_are_those_of_plain_ddp(two_ranks, name) -> None:
    plain = two_ranks(train_normalised, False)
    ours = two_ranks(train_normalised, True, name)
    for mine, expected in zip(ours, plain, strict=True):
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def train_long(steps: int):
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Linear(3, 2))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = steppe.SAM(base, rho=0.3, sync="local")
    g = torch.Generator().manual_seed(distributed.get_rank())
    x, y = torch.randn(64, 3, generator=g), torch.randn(64, 2, generator=g)

    def closure():
        rows = torch.randint(64, (4,), generator=g)
        state = g.get_state()

        def once():
            optimizer.zero_grad()
            loss = (model(x[rows]) - y[rows]).square().mean()
            loss.backward()
            return loss

        g.set_state(state)
        return once

    for _ in range(steps):
        optimizer.step(closure())
    return weights(model)


def test_replicas_stay_equal_for_a_thousand_steps(two_ranks) -> None:
    """Weights that come back by adding and subtracting would have drifted apart after 300."""
    mine, theirs = two_ranks(train_long, 1000 * LONGER)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def train_in_two_calls(name: str):
    model = DistributedDataParallel(net())
    optimizer = make(name, model)
    for step in range(3):
        batch = batch_of(model, *map(share, data(step)))
        with model.no_sync():
            batch()
        optimizer.first_step(zero_grad=True)
        batch()
        optimizer.second_step(zero_grad=True)
    return weights(model)


@pytest.mark.parametrize("name", ["SAM", "ASAM", "WSAM"])
def test_two_calls_under_no_sync_are_local(two_ranks, name) -> None:
    expected = alone(name, {"m": B}, 3)
    for got in two_ranks(train_in_two_calls, name):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def train_without_replicas(name: str):
    model = net()
    optimizer = getattr(steppe, name)(sgd(model), rho=0.3)
    for step in range(2):
        optimizer.step(batch_of(model, *data(step)))
    return weights(model)


@pytest.mark.parametrize("name", ["SAM", "ESAM", "RWSAM"])
def test_a_model_that_is_no_replica_is_alone(two_ranks, name) -> None:
    """Processes that know of one another, and train models of their own."""
    model = net()
    optimizer = getattr(steppe, name)(sgd(model), rho=0.3)
    for step in range(2):
        optimizer.step(batch_of(model, *data(step)))
    for got in two_ranks(train_without_replicas, name):
        assert all(torch.equal(a, b) for a, b in zip(got, weights(model), strict=True))


def train_low(name: str, sync: str):
    model = DistributedDataParallel(branches().bfloat16(), find_unused_parameters=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = getattr(steppe, name)(base, rho=0.3, sync=sync)
    for step in range(3):
        x, y = map(share, data(step))
        optimizer.step(batch_of(model, x.bfloat16(), y))
    return weights(model)


@pytest.mark.parametrize("name", ["SAM", "WSAM", "GSAM", "FSAM"])
@pytest.mark.parametrize("sync", ["local", "global"])
def test_replicas_in_low_precision_with_parameters_of_single_ranks_stay_equal(two_ranks, name, sync) -> None:
    mine, theirs = two_ranks(train_low, name, sync)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def evaluate_after_a_step(name: str | None):
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double())
    batch = batch_of(model, *map(share, data(0)))
    if name is None:
        batch()
    else:
        getattr(steppe, name)(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.3).step(batch)
    model.eval()
    with torch.no_grad():
        return model(data(1)[0])


@pytest.mark.parametrize("name", ["SAM", "WSAM", "RWSAM"])
def test_evaluation_after_a_step_is_that_of_plain_ddp(two_ranks, name) -> None:
    """With the first rank's statistics, on all."""
    for plain, ours in zip(two_ranks(evaluate_after_a_step, None), two_ranks(evaluate_after_a_step, name), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def train_with_noise(static_graph: bool):
    model = DistributedDataParallel(net(), static_graph=static_graph)
    optimizer = steppe.SAM(sgd(model), rho=0.3, gradient_noise=True)
    traces = []
    for step in range(3):
        optimizer.step(batch_of(model, *map(share, data(step))))
        traces.append(float(optimizer.telemetry.trace_V))
    return weights(model), traces


@pytest.mark.parametrize("static_graph", [False, True])
def test_gradient_noise_is_that_of_the_ranks_own_examples(two_ranks, static_graph) -> None:
    (expected, *_), _ = two_ranks(train, "SAM", {}, 3)
    for rank, (got, traces) in enumerate(two_ranks(train_with_noise, static_graph)):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        x, y = (t[rank * B : rank * B + B] for t in data(0))
        noise = steppe.factored.gradient_statistics(batch_of(net(), x, y))
        assert traces[0] == pytest.approx(float(noise.trace), rel=1e-9)


def train_hidden(how: str) -> str | list[float]:
    """A closure whose DDP model no variable refers to: it is the value of a property."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    replica = DistributedDataParallel(net)
    hidden = iter(lambda: replica, None)  # a C object: nothing to search
    options = {"model": replica} if how == "named" else {}
    opt = steppe.SAM(torch.optim.SGD(net.parameters(), lr=0.1), 0.05, **options)
    before = [p.detach().clone() for p in net.parameters()]

    def closure():
        opt.zero_grad()
        loss = next(hidden)(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    try:
        opt.step(closure)
    except RuntimeError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        return str(error)
    return [p.sum().item() for p in net.parameters()]


def test_a_hidden_replica_is_refused_and_a_named_one_trains(two_ranks) -> None:
    assert all("pass model= to the optimizer" in message for message in two_ranks(train_hidden, "hidden"))
    mine, theirs = two_ranks(train_hidden, "named")
    assert mine == theirs


@dataclass(frozen=True)
class OfLosses:
    """A rule of one pass whose backward reuses the graph of its losses."""

    declares: ClassVar[Declaration] = Declaration(g_adv=False, examples=True)

    def __call__(self, f: steppe.Oracle) -> steppe.Update:
        return steppe.Update(f.grad(weights=torch.softmax(f.losses(), 0)))


@dataclass(frozen=True)
class OfSomeTensors:
    """A rule of one pass on a choice of tensors."""

    declares: ClassVar[Declaration] = Declaration(g_adv=False)

    def __call__(self, f: steppe.Oracle) -> steppe.Update:
        return steppe.Update(f.grad(wrt=[True, False] * (len(f.w.tensors) // 2)))


@dataclass(frozen=True)
class TakesAnother:
    """A combine that takes a gradient of its own, so it is not linear in ``g_adv``."""

    declares: ClassVar[Declaration] = Declaration(g=False)

    def __call__(self, f: steppe.Oracle, g_adv: steppe.Vector) -> steppe.Update:
        return steppe.Update(0.5 * g_adv + 0.5 * f.grad())


OWN = {"losses": OfLosses(), "tensors": OfSomeTensors(), "another": steppe.Rule(combine=TakesAnother())}


def train_own(name: str, sync: str) -> list[list[float]]:
    torch.manual_seed(0)
    replica = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))
    torch.manual_seed(1 + distributed.get_rank())
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    opt = steppe.SharpnessAware(torch.optim.SGD(replica.parameters(), lr=0.1), OWN[name], 0.1, sync=sync)
    for _ in range(2):
        opt.step(steppe.Batch.supervised(replica, nn.CrossEntropyLoss(reduction="none"), x, y))
    return [p.flatten().tolist() for p in replica.parameters()]


@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize("name", OWN)
def test_replicas_stay_equal_with_rules_of_ones_own(two_ranks, name: str, sync: str) -> None:
    mine, theirs = two_ranks(train_own, name, sync)
    assert mine == theirs


def train_two_calls_with_a_bad_rank(name: str) -> tuple[list[float], bool]:
    torch.manual_seed(0)
    replica = DistributedDataParallel(nn.Linear(4, 3))
    torch.manual_seed(1 + distributed.get_rank())
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    opt = getattr(steppe, name)(torch.optim.SGD(replica.parameters(), lr=0.1), 0.1)
    for step in range(2):
        bad = float("nan") if distributed.get_rank() == 1 and step == 1 else 1.0
        with replica.no_sync():
            (nn.functional.cross_entropy(replica(x), y) * bad).backward()
        opt.first_step()
        nn.functional.cross_entropy(replica(x), y).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step is skipped
            opt.second_step()
    return [p.sum().item() for p in replica.parameters()], opt.telemetry.was_skipped


@pytest.mark.parametrize("name", ["SAM", "WSAM"])
def test_two_calls_are_skipped_on_all_ranks(two_ranks, name: str) -> None:
    mine, theirs = two_ranks(train_two_calls_with_a_bad_rank, name)
    assert mine == theirs
    assert mine[1]


def train_sampled(sync: str, part: dict) -> tuple[list[float], list[int]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    replica = DistributedDataParallel(net)
    torch.manual_seed(7)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))  # the same on both ranks
    seen: list[int] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.extend(_rows(inputs[0], x)) if len(inputs[0]) == 2 else None)
    opt = steppe.WSAM(torch.optim.SGD(net.parameters(), lr=0.1), 0.1, sync=sync, parallel=False, **part)
    for _ in range(3):
        opt.step(steppe.Batch.supervised(replica, nn.CrossEntropyLoss(reduction="none"), x, y))
    return [p.flatten().tolist() for p in net.parameters()], seen


def _rows(some: torch.Tensor, x: torch.Tensor) -> list[int]:
    return [int((x == row).all(-1).nonzero()) for row in some]


@pytest.mark.parametrize("sync", ["local", "global"])
@pytest.mark.parametrize(("part", "passes"), [({"m": 2, "sampled": 1}, 2), ({"ascent": 2}, 1)], ids=["m", "ascent"])
def test_every_rank_draws_its_own_sample(two_ranks, sync: str, part: dict, passes: int) -> None:
    (mine, my_draws), (theirs, their_draws) = two_ranks(train_sampled, sync, part)
    assert mine == theirs
    assert my_draws != their_draws
    assert len(my_draws) == 3 * passes * 2  # steps, passes, examples


def readings(sync: str) -> tuple[float, ...]:
    """What every rank reads of a run, from data of its own."""
    model = DistributedDataParallel(net())
    opt = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.3, m=2, sampled=1, sync=sync)
    outgrown.EVERY, before = 1, outgrown.EVERY
    try:
        losses = [opt.step(batch_of(model, *map(share, data(k)))) for k in range(3)]
    finally:
        outgrown.EVERY = before
    told = opt._stepper.outgrown
    return float(losses[0]), *told.losses, *told.ratios


@pytest.mark.parametrize("sync", ["local", "global"])
def test_replicas_judge_the_correction_by_the_same_numbers(two_ranks, sync: str) -> None:
    (mine, *ours), (other, *theirs) = two_ranks(readings, sync)
    assert len(ours) == 6
    assert ours == theirs
    assert mine != other
    assert ours[0] == pytest.approx((mine + other) / 2)


def train_on_a_subset(sync: str) -> tuple[list[float], list[float]]:
    """One step of SAM from a subset, and the same by hand; every rank has its own data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    replica = DistributedDataParallel(net)
    torch.manual_seed(7 + distributed.get_rank())
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    batch = steppe.Batch.supervised(replica, nn.CrossEntropyLoss(reduction="none"), x, y)
    before = nn.utils.parameters_to_vector(net.parameters()).detach()
    subset = sampling.batch_of(*sampling.drawn(batch, 2, 1, 0, 0, distributed.get_rank()))

    def mean_over_ranks(v: torch.Tensor) -> torch.Tensor:
        distributed.all_reduce(v)
        return v / 2

    def gradient(of: steppe.Batch) -> torch.Tensor:
        loss = nn.functional.cross_entropy(net(of.data[0]), of.data[1])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])

    d = gradient(subset)
    d = mean_over_ranks(d) if sync == "global" else d
    nn.utils.vector_to_parameters(before + 0.1 * d / d.norm(), net.parameters())
    by_hand = before - 0.1 * mean_over_ranks(gradient(batch))
    nn.utils.vector_to_parameters(before, net.parameters())
    steppe.SAM(torch.optim.SGD(net.parameters(), lr=0.1), 0.1, ascent=2, sync=sync).step(batch)
    return nn.utils.parameters_to_vector(net.parameters()).tolist(), by_hand.tolist()


@pytest.mark.parametrize("sync", ["local", "global"])
def test_a_subset_of_every_rank(two_ranks, sync: str) -> None:
    """Every rank has its own perturbation, or all share that of their subsets together."""
    (mine, by_hand), (theirs, _) = two_ranks(train_on_a_subset, sync)
    assert mine == theirs
    assert mine == pytest.approx(by_hand, rel=1e-9, abs=1e-12)


def train_as_nanogpt(sync: str, idiom: bool) -> list[torch.Tensor]:
    """Two micro-batches in a closure, of which the last alone is averaged by DDP if it is for the closure to say."""
    model = DistributedDataParallel(net())
    optimizer = steppe.SAM(sgd(model), rho=0.3, sync=sync)
    for step in range(3):
        parts = list(zip(*(t.split(3) for t in map(share, data(step))), strict=True))

        def closure(parts=parts):
            optimizer.zero_grad()
            for k, (x, y) in enumerate(parts):
                if idiom:
                    model.require_backward_grad_sync = k == len(parts) - 1
                loss = nn.functional.cross_entropy(model(x), y) / len(parts)
                loss.backward()
            return loss

        optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("sync", ["local", "global"])
def test_a_closure_that_sets_when_ddp_averages(two_ranks, sync) -> None:
    """``require_backward_grad_sync = True`` would average the gradient of a perturbation that is each rank's own."""
    ours, theirs = two_ranks(train_as_nanogpt, sync, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, two_ranks(train_as_nanogpt, sync, False)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def step_inside_join() -> str:
    model = DistributedDataParallel(net())
    optimizer = steppe.SAM(sgd(model))
    with model.join():
        try:
            optimizer.step(batch_of(model, *map(share, data(0))))
        except RuntimeError as error:
            return str(error)
    return "stepped"


def test_join_is_refused_by_name(two_ranks) -> None:
    assert all(r"DDP's join()" in answer for answer in two_ranks(step_inside_join))


def mean_of_labels(model: nn.Module, d: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(d[0]), d[1])


def train_on_few_labels(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model = DistributedDataParallel(net())
    x, y = map(share, data(0))
    if distributed.get_rank() == 1:
        y = torch.full_like(y, -100).index_copy(0, torch.tensor([0]), y[:1])
    optimizer = make(name, model, m=1, sampled=1)
    batch = steppe.MeanBatch(model, mean_of_labels, (x, y), weight=lambda d: (d[1] != -100).sum())
    for _ in range(6):  # a draw of one example would have no label on rank 1 in most
        optimizer.step(batch)
    memory = [t for p in model.parameters() for _, t in sorted(optimizer.state[p].items())]
    return weights(model), memory


@pytest.mark.parametrize("name", ["WSAM", "FSAM"])
def test_draws_have_labels_on_every_rank(two_ranks, name) -> None:
    """Each rank moves beside the base, and remembers, at every step."""
    for mine, theirs in zip(*two_ranks(train_on_few_labels, name), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def train_where_steep_on_one_rank() -> tuple[list[torch.Tensor], list[float]]:
    model = DistributedDataParallel(net())
    rule = steppe.Micro(B, steppe.WhereSteep(steppe.Rule(combine=steppe.Weighted(0.9))))
    optimizer = steppe.SharpnessAware(torch.optim.SGD(model.parameters(), lr=0.01), rule, 0.1)
    x, y = map(share, data(0))
    passes = []
    for step in range(3):
        scale = (10.0 if distributed.get_rank() else 0.1) ** step
        criterion = nn.CrossEntropyLoss(reduction="none", weight=torch.full((3,), scale, dtype=torch.float64))
        optimizer.step(steppe.Batch.supervised(model, criterion, x, y))
        passes.append(optimizer.telemetry.passes)
    return weights(model), passes


def test_one_rank_may_move_beside_the_base_alone(two_ranks) -> None:
    (mine, one), (theirs, two) = two_ranks(train_where_steep_on_one_rank)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert (one, two) == ([2, 1, 1], [2, 2, 2])
