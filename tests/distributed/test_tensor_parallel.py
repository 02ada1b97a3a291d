"""Tensor parallel models, alone and with ``fully_shard``: norms over all shards, equal to one process."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import steppe
from steppe.engine import sampling

B = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.into(self.norm(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


PLAN = {"into": ColwiseParallel(), "out": RowwiseParallel()}
SEQUENCES = {"norm": SequenceParallel(), "into": ColwiseParallel(input_layouts=Shard(1)), "out": RowwiseParallel()}


def data(step: int, *shape: int) -> torch.Tensor:
    return torch.randn(B, *shape, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def trained(model: nn.Module, x: list[torch.Tensor], name: str, options: dict) -> tuple[list[torch.Tensor], float]:
    optimizer = getattr(steppe, name)(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.3, **options)
    for each in x:
        loss = lambda m, d: (m(d).flatten(1) - 1).square().sum(1)  # noqa: E731
        optimizer.step(steppe.Batch(model, loss, each))
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach() for p in whole], float(optimizer.telemetry.g_norm)


def in_two_dimensions(name: str, options: dict):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(net(), mesh["tp"], PLAN)
    for layer in (model.into, model.out):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    half = slice(mesh.get_local_rank("dp") * B // 2, (mesh.get_local_rank("dp") + 1) * B // 2)
    return trained(model, [data(k)[half] for k in range(3)], name, options)


def in_sequences(name: str, options: dict):
    mesh = init_device_mesh("cpu", (2,))
    part = slice(2 * distributed.get_rank(), 2 * distributed.get_rank() + 2)
    return trained(parallelize_module(net(), mesh, SEQUENCES), [data(k, 4)[:, part] for k in range(3)], name, options)


def assert_close(ranks, expected) -> None:
    for ours, norm in ranks:
        assert norm == pytest.approx(expected[1], rel=1e-10)
        for a, b in zip(ours, expected[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "options"), [("SAM", {}), ("SAM", {"max_norm": 0.05}), ("ASAM", {}), ("GSAM", {})])
def test_a_mesh_of_two_dimensions_is_the_whole_batch_on_one(four_ranks, name, options) -> None:
    """Its strided shards answer no to ``is_shard``, so their norms were taken for whole ones."""
    expected = trained(net(), [data(k) for k in range(3)], name, options)
    assert_close(four_ranks(in_two_dimensions, name, options), expected)


@pytest.mark.parametrize("part", [{"m": 2, "sampled": 1}, {"ascent": 2}], ids=["sampled", "ascent"])
def test_ranks_that_split_a_layer_draw_the_same_examples(four_ranks, monkeypatch, part) -> None:
    indices = steppe.Batch(nn.Identity(), lambda *_: None, torch.arange(B // 2))
    real = sampling.drawn

    def both(batch: steppe.Batch, *draw) -> list[sampling.Draw]:
        return [(batch, torch.cat([on, B // 2 + on])) for _, on in real(indices, *draw)]

    monkeypatch.setattr(sampling, "drawn", both)
    expected = trained(net(), [data(k) for k in range(3)], "SAM", part | {"parallel": False})
    assert_close(four_ranks(in_two_dimensions, "SAM", part), expected)


@pytest.mark.parametrize("name", ["SAM", "WSAM", "FisherSAM"])
def test_gradients_that_are_sums_not_yet_taken_are_whole(two_ranks, name) -> None:
    """Each rank has the gradient of its part of the sequence for the layer norm, which all of them hold."""
    expected = trained(net(), [data(k, 4) for k in range(3)], name, {})
    assert_close(two_ranks(in_sequences, name, {}), expected)


def hidden_shards() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = DistributedDataParallel(parallelize_module(net(), mesh["tp"], PLAN), device_mesh=mesh["dp"])
    try:
        steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    except TypeError as error:
        return str(error)
    return "made"


def test_shards_that_ddp_keeps_as_plain_tensors_are_refused(four_ranks) -> None:
    assert all("params must not be the tensor-parallel shards" in answer for answer in four_ranks(hidden_shards))
