"""Hessian-vector products from gradients."""

import torch

from steppe.engine.passes import Passes
from steppe.engine.vector import TINY, Vector, wide
from steppe.engine.weights import moved


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
