"""Long random programs on two ranks: replicas stay equal, and the path is that of one process."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import steppe
from tests.cases import scaler
from tests.distributed.test_ddp import LONGER, NAMES, B, batch_of, data, share, weights
from tests.models import Branches

EVENTS = {"none": 30, "bad": 12, "left out": 10, "freeze": 5, "lr": 5, "resume": 5}


PROBED = ("RWSAM", "ReweightedSharpness")  # norms of a list of batches come from a probe, others are exact
BOTH, ONE = [[0, 1]], [[0]]  # branches that take part


def branches() -> Branches:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh())
    return Branches([nn.Linear(8, 3), nn.Linear(8, 3)], body)


def fresh(name: str, sync: str, ranked: bool):
    inner = branches().double()
    model = DistributedDataParallel(inner, find_unused_parameters=True) if ranked else inner
    options = {"sync": sync} if ranked else {"m": B} if sync == "local" else {"parallel": False}
    if name == "NSAM":
        x, y = data(1000)
        options["full"] = batch_of(model, share(x), share(y)) if ranked and sync == "global" else batch_of(model, x, y)
    if name == "ESAM":
        options["gamma"] = 1.0  # its selection is each rank's own
    base = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    return inner, model, getattr(steppe, name)(base, rho=0.3, **options)


def ways(batch: steppe.Batch, optimizer: steppe.SharpnessAware, way: str, scaler) -> None:
    if way == "list":
        optimizer.step([batch.subset(torch.arange(0, 3)), batch.subset(torch.arange(3, B))], scaler=scaler)
    elif way == "backward":
        optimizer.backward(batch, scaler=scaler)
        optimizer.step()
    else:
        optimizer.step(batch, scaler=scaler)
    if scaler is not None:
        scaler.update()


def train(name: str, sync: str, ranked: bool, steps: int):
    """The same events on all ranks, drawn from the name; one process leaves out the steps that are skipped."""
    warnings.simplefilter("ignore")
    draw = random.Random(name + sync)
    inner, model, optimizer = fresh(name, sync, ranked)
    frozen, path, skipped = False, [], 0
    scalers = {True: scaler(64.0), False: None}
    for step in range(steps):
        event, way = draw.choices(list(EVENTS), list(EVENTS.values()))[0], draw.choice(["batch", "list", "backward"])
        scaled, bad_rank = draw.random() < 0.3, draw.randrange(2)
        if event == "freeze":
            frozen = not frozen
            inner.branches[1].requires_grad_(not frozen)
        elif event == "lr":
            for group in optimizer.param_groups:
                group["lr"] = 0.02 - group["lr"]
        elif event == "resume":
            saved = copy.deepcopy((inner.state_dict(), optimizer.state_dict()))
            inner, model, optimizer = fresh(name, sync, ranked)
            inner.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            inner.branches[1].requires_grad_(not frozen)
        inner.pattern = ONE if event == "left out" else BOTH
        x, y = data(step)
        if not ranked:
            if event != "bad":
                optimizer.step(batch_of(model, x, y))
        else:
            x, y = share(x), share(y)
            if event == "bad" and distributed.get_rank() == bad_rank:
                x = x * torch.inf
            ways(batch_of(model, x, y), optimizer, way, scalers[scaled])
            assert optimizer.telemetry.was_skipped == (event == "bad")
            skipped += event == "bad"
        path.append(torch.cat([w.flatten() for w in weights(inner)]))
    return path, skipped


# ``test_ddp.py`` has every method with one perturbation for all ranks; here one of each kind has it too
SAME = [(name, "local") for name in NAMES if name not in (*PROBED, "AESAM")]  # of which each rank decides by itself
SAME += [(name, "global") for name in ("SAM", "WSAM", "FSAM", "NSAM", "LookSAM", "AESAM", "MomentumSAM")]


@pytest.mark.parametrize(("name", "sync"), SAME)
def test_two_ranks_and_one_process_go_the_same_way(two_ranks, name, sync) -> None:
    steps = 25 * LONGER
    expected, _ = train(name, sync, False, steps)
    (mine, skipped), (theirs, _) = two_ranks(train, name, sync, True, steps)
    assert skipped > 0
    for a, b, c in zip(mine, theirs, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-8)
