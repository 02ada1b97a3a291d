"""Two processes that shard a model (FSDP2): products by central differences, eigenvalues, everything put back."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steppe.measure import CentralDifference, Hessian, Problem, eigenpairs

from .models import CRITERION, data, dense, net


def _rank(rank: int, store: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model, xy = net(), data(22)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        mine = tuple(t[rank * 11 : (rank + 1) * 11] for t in xy)  # as a distributed sampler deals
        before = [p.detach().to_local().clone() for p in model.parameters()]
        problem = Problem(model, CRITERION, mine)
        H = Hessian(problem, CentralDifference())
        found = eigenpairs(H, tol=1e-4)
        expected = float(torch.linalg.eigvalsh(dense("Hessian", net(), xy))[-1])
        assert abs(found.value - expected) < 1e-5 * expected, (found.value, expected)
        assert all(torch.equal(p.to_local(), t) for p, t in zip(model.parameters(), before, strict=True))
        with pytest.raises(TypeError, match="sharded model cannot be differentiated twice"):
            Hessian(problem) @ found.vectors[0]
    finally:
        dist.destroy_process_group()


def test_a_sharded_models_top_eigenvalue(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)
