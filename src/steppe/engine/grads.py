"""``p.grad`` before and after a pass: what a pass has left is taken here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch._C import _storage_address, _storage_Use_Count  # type: ignore[attr-defined]

from steppe.engine.vector import Vector, is_sharded


def drop(parameters: Sequence[Tensor]) -> None:
    """Set every ``p.grad`` to ``None``."""
    for p in parameters:
        p.grad = None


def zero_grad(model: nn.Module) -> None:
    """Drop the gradients of a model."""
    if getattr(model.zero_grad, "__func__", None) is not nn.Module.zero_grad:  # the model's own
        model.zero_grad(set_to_none=True)
        return
    for module in modules_of(model):
        drop([p for p in module._parameters.values() if p is not None])


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules, each once; faster than ``nn.Module.modules``, which builds names."""
    found, seen = [model], {id(model)}
    for module in found:
        for inner in module._modules.values() if module._modules else ():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found


@contextmanager
def only(parameters: Sequence[Tensor], wrt: Sequence[bool] | None) -> Iterator[None]:
    """Freeze the parameters where ``wrt`` is false, so that their backward is saved."""
    left_out = [] if wrt is None else [p for p, k in zip(parameters, wrt, strict=True) if not k and p.requires_grad]
    for p in left_out:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in left_out:
            p.requires_grad_(True)


def take(parameters: Sequence[Tensor]) -> Vector:
    """Return the gradients in memory that the next pass does not write, and leave ``None``."""
    return Vector([_take(p) for p in parameters])


def _take(p: Tensor) -> Tensor | None:
    g, p.grad = p.grad, None
    if g is None:
        return None
    if g.is_sparse:
        raise TypeError("steppe needs dense gradients, got a sparse one: use nn.Embedding(sparse=False)")
    if type(g) is not Tensor and is_sharded(g) and g.placements != p.placements:  # type: ignore[attr-defined]
        whole: Tensor = g.detach().redistribute(placements=p.placements)  # type: ignore[attr-defined]
        return whole  # each rank had a part of the sum
    # DDP's buckets and CUDA graphs write the next gradient into memory that they hold: then g must be copied.
    # Only the number of holders tells; g is one.
    shared = _storage_Use_Count(_storage_address(g)) > 1
    return g.detach().clone() if shared else g.detach() if g.requires_grad else g
