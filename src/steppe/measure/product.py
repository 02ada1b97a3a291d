"""Two ways to differentiate along a direction: two backward passes, or central differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.vector import TINY, Vector
from steppe.measure.problem import Problem

LENGTHS = {torch.float32: 1e-4, torch.float64: 1e-6}
Curvature = Callable[[Tensor, Tensor], Tensor]  # (f, J v) -> B(f) J v


@dataclass(frozen=True)
class DoubleBackward:
    """Products to rounding: ``H v = d/dw <grad f, v>`` and ``J v = d/du <J^T u, v>``, a second backward each.

    Attention runs its math kernel, the only one that can be differentiated twice. Under DDP each rank gets the product
    on its own data.
    """

    def gradient(self, problem: Problem) -> Vector:
        """Return ``g``, the gradient of the mean loss."""
        g, w = Vector([None] * len(problem.w)), problem.w
        with problem.untouched():
            for batch in problem.batches():
                g = g + Vector(torch.autograd.grad(batch.losses().sum(), w, allow_unused=True))
        return g / problem.n

    def hessian(self, problem: Problem, f: Callable[[], Tensor], v: Vector) -> Vector:
        """Return ``(d^2 f / dw^2) v`` of a scalar ``f``."""
        w = problem.w
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(f(), w, create_graph=True, allow_unused=True)
            return Vector(_pull(g, w, v))

    def gauss_newton(self, problem: Problem, f: Callable[[], Tensor], B: Curvature, v: Vector) -> Vector:
        """Return ``J^T B(f) J v`` of ``f`` of any shape."""
        w = problem.w
        with sdpa_kernel(SDPBackend.MATH):
            z = f()
            u = torch.zeros_like(z, requires_grad=True)
            Ju = torch.autograd.grad(z, w, u, create_graph=True, allow_unused=True)
            (Jv,) = _pull(Ju, [u], v)
            if Jv is None:
                return Vector([None] * len(w))
            return Vector(torch.autograd.grad(z, w, B(z.detach(), Jv), allow_unused=True))


def _pull(g: Sequence[Tensor | None], inputs: Sequence[Tensor], v: Vector) -> Sequence[Tensor | None]:
    """Return ``d <g, v> / d inputs``; entries of ``g`` that are constant or ``None`` count as zero."""
    pairs = [(a, b) for a, b in zip(g, v.materialised(), strict=True) if a is not None and b is not None]
    pairs = [(a, b) for a, b in pairs if a.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, directions, allow_unused=True)


@dataclass(frozen=True)
class CentralDifference:
    """``H v = (grad f(w + h v) - grad f(w - h v)) / 2 h``: for models that cannot be differentiated twice.

    These are compiled and sharded (FSDP2) models. The gradients come from ordinary backward passes, so under data
    parallelism they are averages over the ranks. The error grows with ``h^2`` by fourth derivatives of the loss and
    with ``1 / h`` by rounding. For smooth networks (GELU, tanh) it is about 1e-4 at the top eigenvector and 1e-3 in a
    random direction in float32. Not for ReLU in float32: each unit that changes sign between the two points adds a jump
    of the gradient over ``2 h``, and errors of 10 to 400 % are usual; in float64 the points are too close for that.

    Args:
        length: ``h norm(v)`` as a share of ``norm(w)``; ``None`` is 1e-4 in float32 and 1e-6 in float64.

    Raises:
        ValueError: ``length`` is not above 0.
        TypeError: in a product, where parameters are in low precision.
    """

    length: float | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            checks.number("length", self.length, "a finite number > 0", low=1e-30)

    def gradient(self, problem: Problem) -> Vector:
        """Return ``g``, the gradient of the mean loss."""
        with problem.untouched():
            return problem.oracle().grad()

    def hessian(self, problem: Problem, f: Callable[[], Tensor], v: Vector) -> Vector:
        """Return ``(d^2 f / dw^2) v`` of a scalar ``f``."""
        oracle, h = _oracle(problem, f), self.h(problem, v)
        with oracle.at(h * v):
            ahead = oracle.grad()
        with oracle.at(-h * v):
            behind = oracle.grad()
        return (ahead - behind) / (2 * h)

    def gauss_newton(self, problem: Problem, f: Callable[[], Tensor], B: Curvature, v: Vector) -> Vector:
        """Return ``J^T B(f) J v`` of ``f`` of any shape."""
        random, z = problem.random_state(), list[Tensor]()

        def replayed() -> Tensor:
            random.restore()  # the same dropout masks in all three passes
            return f()

        def against() -> Tensor:
            here = replayed()
            return (here * B(here.detach(), (z[0] - z[1]) / (2 * h))).sum()

        oracle, h = _oracle(problem, against), self.h(problem, v)
        for eps in (h * v, -h * v):
            with oracle.at(eps), problem.frozen(), torch.no_grad():
                z.append(replayed())
            problem.reshard()
        return oracle.grad()

    def h(self, problem: Problem, v: Vector) -> float:
        """Return the step at which ``norm(h v)`` is the chosen length; where ``w`` is 0, its norm counts as 1."""
        w = Vector([p.detach() for p in problem.parameters]).norm()
        length = self.length or LENGTHS[w.dtype]
        return length * (float(w) or 1.0) / (float(v.norm()) + TINY)


def _oracle(problem: Problem, f: Callable[[], Tensor]) -> Oracle:
    def closure() -> Tensor:
        value = f()
        value.backward()
        return value

    return problem.oracle(closure)
