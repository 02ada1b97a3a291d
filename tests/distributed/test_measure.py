"""Two ranks that shard a model (FSDP2): products by central differences, eigenvalues, everything put back."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from steppe.measure import CentralDifference, Hessian, Problem, eigenpairs
from tests.measure.models import CRITERION, data, dense, net


def top_eigenvalue() -> float:
    model, (x, y), rank = net(), data(22), torch.distributed.get_rank()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    before = [p.detach().to_local().clone() for p in model.parameters()]
    problem = Problem(model, CRITERION, (x[11 * rank :][:11], y[11 * rank :][:11]))
    found = eigenpairs(Hessian(problem, CentralDifference()), tol=1e-4)
    assert all(torch.equal(p.to_local(), t) for p, t in zip(model.parameters(), before, strict=True))
    with pytest.raises(TypeError, match="sharded model cannot be differentiated twice"):
        Hessian(problem) @ found.vectors[0]
    return found.value


def test_a_sharded_models_top_eigenvalue(two_ranks):
    expected = float(torch.linalg.eigvalsh(dense("Hessian", net(), data(22)))[-1])
    assert two_ranks(top_eigenvalue) == pytest.approx([expected] * 2, rel=1e-5)
