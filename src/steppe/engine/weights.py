"""Weights at ``w + eps`` and back: the only code that perturbs them in a step's own passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from steppe.engine.passes import Passes
from steppe.engine.vector import TINY, Vector, local, shift_all_, wide


class NotFinite(Exception):  # noqa: N818
    """A gradient is not finite: the step is to be skipped."""


@contextmanager
def moved(passes: Passes, eps: Vector, guard: bool) -> Iterator[None]:
    """Move the weights by ``eps``, and back bit for bit, in place, also when a pass raises.

    Args:
        passes: the step's passes, which are away from ``w`` inside.
        eps: where to; entries that are ``None`` stay.
        guard: take no pass at weights that are not finite.

    Raises:
        NotFinite: ``guard`` is set and ``eps`` is not finite.
        RuntimeError: the weights are away from ``w`` already.
    """
    passes.detach_losses()
    norm = passes.log.numbers["eps_norm"] = eps.norm()
    known = norm.device.type == "cpu" and passes.ranks.alone
    if guard and known and not norm.isfinite():
        raise NotFinite
    finite = norm if guard and not known else None  # else eps becomes 0, on its device and on this rank
    moved: list[Tensor] = []
    saved: list[Tensor] = []
    with passes.away_from_w():
        try:
            with torch.no_grad():
                passes.reshard()
                parameters = passes.parameters.tensors
                moved = [local(p) for p, t in zip(parameters, eps.tensors, strict=True) if t is not None]
                # all before any moves: two may lie on one memory
                saved = list(torch._foreach_clone(moved)) if moved else []
                shift_all_(moved, [local(e) for e in eps.present()], eps.scale, finite)
                torch.clear_autocast_cache()  # an autocast around the whole step holds casts of w
            del eps  # frees the memory of g
            yield
        finally:
            if saved:
                with torch.no_grad():
                    torch._foreach_copy_(moved, saved)  # one call: no interrupt comes half way
                torch.clear_autocast_cache()
                passes.reshard()


def hessian_vector_product(passes: Passes, v: Vector, guard: bool) -> Vector:
    """Return the Hessian times ``v``, as :meth:`steppe.Oracle.hvp` says; ``guard`` as for :func:`moved`."""
    w = passes.parameters.tensors
    if any(wide(p) is not p for p in w):
        raise TypeError("hvp needs parameters in float32 or float64: low precision cannot hold its small step")
    h = float(max(torch.finfo(p.dtype).eps for p in w) ** (1 / 3)) / (v.norm() + TINY)
    with moved(passes, h * v, guard):
        ahead = passes.gradient()
    with moved(passes, -h * v, guard):
        behind = passes.gradient()
    return (ahead - behind) / (2 * h)
