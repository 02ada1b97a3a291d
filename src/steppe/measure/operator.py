"""Curvature matrices of size ``(d, d)``, never formed, and two ways to compute their products with vectors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.batch import Batch
from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.passes import reshard
from steppe.engine.replay import frozen_statistics
from steppe.engine.vector import TINY, Vector
from steppe.measure.problem import Problem

LENGTHS = {torch.float32: 1e-4, torch.float64: 1e-6}
Curvature = Callable[[Tensor, Tensor], Tensor]  # (f, J v) -> B(f) J v
Term = Callable[[Batch], Vector]  # a batch's part of the product with one vector: the sum over its examples


@dataclass(frozen=True)
class DoubleBackward:
    """Products to rounding: ``H v = d/dw <grad f, v>`` and ``J v = d/du <J^T u, v>``, a second backward each.

    Attention runs its math kernel, the only one that can be differentiated twice. Under DDP each rank gets the product
    on its own data.
    """

    def gradient(self, problem: Problem) -> Vector:
        """Return the gradient of the mean loss."""
        g = Vector([None] * len(problem.w))
        with problem.untouched():
            for batch in problem.batches():
                g = g + Vector(torch.autograd.grad(batch.losses().sum(), problem.w, allow_unused=True))
        return g / problem.n

    def hessian(self, problem: Problem, f: Callable[[], Tensor], v: Vector) -> Vector:
        """Return ``(d^2 f / dw^2) v`` of a scalar ``f``."""
        with sdpa_kernel(SDPBackend.MATH):
            g = torch.autograd.grad(f(), problem.w, create_graph=True, allow_unused=True)
            return Vector(_pull(g, problem.w, v))

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
    entries = zip(g, v.materialised(), strict=True)
    pairs = [(a, b) for a, b in entries if a is not None and b is not None and a.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, inputs, directions, allow_unused=True)


@dataclass(frozen=True)
class CentralDifference:
    """``H v = (grad f(w + h v) - grad f(w - h v)) / 2 h``: for models that cannot be differentiated twice.

    These are compiled and sharded (FSDP2) models. The gradients come from ordinary backward passes, so under data
    parallelism they are averages over the ranks. In float32 the error is about 1e-3 for smooth networks, but 10 to
    400 % with ReLU, where each unit that changes sign between the two points adds a jump over ``2 h``.

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
        """Return the gradient of the mean loss."""
        with problem.untouched():
            return problem.oracle().grad()

    def hessian(self, problem: Problem, f: Callable[[], Tensor], v: Vector) -> Vector:
        """Return ``(d^2 f / dw^2) v`` of a scalar ``f``."""
        oracle, h = _oracle(problem, f), self._h(problem, v)
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

        oracle, h = _oracle(problem, against), self._h(problem, v)
        for eps in (h * v, -h * v):
            with oracle.at(eps), frozen_statistics(problem.model.modules()), torch.no_grad():
                z.append(replayed())
            reshard(problem.model.modules())
        return oracle.grad()

    def _h(self, problem: Problem, v: Vector) -> float:
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


Product = DoubleBackward | CentralDifference


class Operator(ABC):
    """``A v = 1/n sum_i A_i v``, averaged over the examples of a problem, one batch at a time.

    Args:
        problem: model, loss and data.
        product: :class:`DoubleBackward`, or :class:`CentralDifference` for models that it does not support.

    Raises:
        TypeError: the model is compiled or sharded, and ``product`` is not :class:`CentralDifference`.
    """

    def __init__(self, problem: Problem, product: Product | None = None) -> None:
        self.problem, self.product = problem, product or DoubleBackward()
        compiled = any(hasattr(module, "_orig_mod") for module in problem.model.modules())
        sharded = any(hasattr(p, "device_mesh") for p in problem.parameters)
        if isinstance(self.product, DoubleBackward) and (compiled or sharded):
            kind = "compiled" if compiled else "sharded"
            raise TypeError(f"a {kind} model cannot be differentiated twice: pass product=CentralDifference()")

    @abstractmethod
    def _term(self, v: Vector) -> Term: ...

    @cached_property
    def like(self) -> Sequence[Tensor]:
        """Return the parameters, for their shapes, types and devices."""
        return [p.detach() for p in self.problem.w]

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(d, d)``, ``d`` the number of weights."""
        d = sum(p.numel() for p in self.like)
        return d, d

    @overload
    def __matmul__(self, v: Vector, /) -> Vector: ...
    @overload
    def __matmul__(self, v: Tensor, /) -> Tensor: ...
    def __matmul__(self, v: Vector | Tensor, /) -> Vector | Tensor:
        """Return the product with ``v``: a vector with one entry per parameter, or a tensor of shape ``(d,)``."""
        if isinstance(v, Tensor):
            if v.shape != (self.shape[0],):
                raise ValueError(f"v must have shape {(self.shape[0],)}, got {tuple(v.shape)}")
            parts = zip(v.split([p.numel() for p in self.like]), self.like, strict=True)
            Av = (self @ Vector([part.view_as(p).to(p) for part, p in parts])).materialised()
            rows = zip(Av, self.like, strict=True)
            return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in rows])
        if len(v.tensors) != len(self.like) or any(
            t is not None and t.shape != p.shape for t, p in zip(v.tensors, self.like, strict=True)
        ):
            raise ValueError("v must have one entry per parameter, of the parameter's shape, or None")
        total, term = Vector([None] * len(self.like)), self._term(v)
        with self.problem.untouched():
            for batch in self.problem.batches():
                total = total + term(batch)
        return total / self.problem.n


class Hessian(Operator):
    """``H = 1/n sum_i d^2 f_i / dw^2``.

    Example:
        >>> H = Hessian(Problem(model, criterion, loader))
        >>> Hv = H @ torch.randn(H.shape[0])
    """

    def _term(self, v: Vector) -> Term:
        return lambda batch: self.product.hessian(self.problem, lambda: batch.losses().sum(), v)


class GaussNewton(Operator):
    """``G = 1/n sum_i J_i^T B_i J_i``, ``J_i`` the outputs' Jacobian, ``B_i`` the loss's Hessian in the outputs.

    The generalised Gauss-Newton matrix (Schraudolph 2002): the Hessian of the model linearised at ``w``, positive
    semidefinite for a convex criterion, and the Fisher matrix for cross entropy and squared error.

    Raises:
        TypeError: the problem's loss is no criterion module, so that outputs and loss are not separate.
    """

    def __init__(self, problem: Problem, product: Product | None = None) -> None:
        if not isinstance(problem.loss, nn.Module):
            raise TypeError("GaussNewton needs a problem whose loss is a criterion module, for data (inputs, targets)")
        super().__init__(problem, product)

    def _term(self, v: Vector) -> Term:
        def on(batch: Batch) -> Vector:
            def B(z: Tensor, Jv: Tensor) -> Tensor:
                z = z.detach().requires_grad_()
                (dz,) = torch.autograd.grad(self.problem.criterion(batch, z).sum(), z, create_graph=True)
                return torch.autograd.grad(dz, z, Jv)[0] if dz.requires_grad else torch.zeros_like(z)

            return self.product.gauss_newton(self.problem, lambda: self.problem.outputs(batch), B, v)

        return on


class EmpiricalFisher(Operator):
    """``F = 1/n sum_i g_i g_i^T``, ``g_i = grad f_i``: uncentred second moments of the per-example gradients.

    No per-example gradient is formed: ``F v = 1/n J^T J v`` with the Jacobian of the ``n`` losses.
    """

    def _term(self, v: Vector) -> Term:
        return lambda batch: self.product.gauss_newton(self.problem, batch.losses, lambda losses, Jv: Jv, v)


class GradientCovariance(Operator):
    """``V = 1/n sum_i (g_i - g)(g_i - g)^T``, ``g`` the mean gradient; a product takes one more pass for ``g``.

    ``V v = 1/n J^T (J v - <g, v>)``. Population covariance: times ``n / (n - 1)`` it is unbiased for the distribution
    that the examples were drawn from.
    """

    def _term(self, v: Vector) -> Term:
        gv = self.product.gradient(self.problem).dot(v)

        def centred(losses: Tensor, Jv: Tensor) -> Tensor:
            return Jv - gv.to(Jv)

        return lambda batch: self.product.gauss_newton(self.problem, batch.losses, centred, v)
