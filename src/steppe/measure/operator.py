"""Curvature matrices of size ``(d, d)``, never formed: their products with vectors."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.batch import Batch
from steppe.engine.vector import Vector, is_sharded
from steppe.measure.problem import Problem

Term = Callable[[Batch], Vector]  # a batch's part of the product with one vector: the sum over its examples


class Operator(ABC):
    """``A v = 1/n sum_i A_i v``, averaged over the examples of a problem, one batch at a time.

    Products are exact to rounding, by a second backward pass: ``H v = d/dw <grad f, v>`` and ``J v = d/du <J^T u, v>``.
    Compiled models run their eager code, and attention its math kernel: only these can be differentiated twice. Under
    DDP each rank gets the product on its own data.

    Raises:
        TypeError: in a product, if the model is sharded (FSDP2), so that it cannot be differentiated twice.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def _term(self, v: Vector) -> Term: ...

    @cached_property
    def like(self) -> Sequence[Tensor]:
        """Return the parameters, for their shapes, types and devices."""
        return [p.detach() for p in self.problem.parameters]

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
        return self._product(v)

    def _product(self, v: Vector) -> Vector:
        if any(map(is_sharded, self.like)):
            raise TypeError("a sharded model cannot be differentiated twice: Hessian(problem, CentralDifference())")
        total, term = Vector([None] * len(self.like)), self._term(v)
        with self.problem.untouched(), _differentiable_twice():
            for batch in self.problem.batches():
                total = total + term(batch)
        return total / self.problem.n


@dataclass(frozen=True)
class CentralDifference:
    """``H v = (grad L(w + h v) - grad L(w - h v)) / 2 h``: the Hessian's products for sharded models (FSDP2).

    It is :meth:`steppe.Oracle.hvp`. The gradients come from ordinary backward passes, so under data parallelism they
    are averages over the ranks. In float32 the error is below 1e-3 for smooth networks. With ReLU it can be larger than
    the product: each unit that changes sign between the two points adds a jump over ``2 h``.
    """

    def __call__(self, problem: Problem, v: Vector) -> Vector:
        """Return ``H v``."""
        with problem.untouched():
            return problem.oracle().hvp(v)


class Hessian(Operator):
    """``H = 1/n sum_i d^2 f_i / dw^2``.

    Args:
        problem: model, loss and data.
        product: ``None`` for a second backward pass, or :class:`CentralDifference` for sharded models.

    Example:
        >>> H = Hessian(Problem(model, criterion, loader))
        >>> Hv = H @ torch.randn(H.shape[0])
    """

    def __init__(self, problem: Problem, product: CentralDifference | None = None) -> None:
        super().__init__(problem)
        self.product = product

    def _product(self, v: Vector) -> Vector:
        return super()._product(v) if self.product is None else self.product(self.problem, v)

    def _term(self, v: Vector) -> Term:
        w = self.problem.parameters

        def on(batch: Batch) -> Vector:
            g = torch.autograd.grad(batch.losses().sum(), w, create_graph=True, allow_unused=True)
            return Vector(_pull(g, w, v))

        return on


class GaussNewton(Operator):
    """``G = 1/n sum_i J_i^T B_i J_i``, ``J_i`` the outputs' Jacobian, ``B_i`` the loss's Hessian in the outputs.

    The generalised Gauss-Newton matrix (Schraudolph 2002): the Hessian of the model linearised at ``w``, positive
    semidefinite for a convex criterion, and the Fisher matrix for cross entropy and squared error.

    Args:
        problem: model, criterion module and data ``(inputs, targets)``.

    Raises:
        TypeError: the problem's loss is no criterion module, so that outputs and loss are not separate.
    """

    def __init__(self, problem: Problem) -> None:
        if not isinstance(problem.loss, nn.Module):
            raise TypeError("GaussNewton needs a problem whose loss is a criterion module, for data (inputs, targets)")
        super().__init__(problem)

    def _term(self, v: Vector) -> Term:
        def on(batch: Batch) -> Vector:
            def B(z: Tensor, Jv: Tensor) -> Tensor:
                z = z.requires_grad_()
                (dz,) = torch.autograd.grad(self.problem.criterion(batch, z).sum(), z, create_graph=True)
                return torch.autograd.grad(dz, z, Jv)[0] if dz.requires_grad else torch.zeros_like(z)

            return _gauss_newton(self.problem.outputs(batch), self.problem.parameters, B, v)

        return on


class EmpiricalFisher(Operator):
    """``F = 1/n sum_i g_i g_i^T``, ``g_i = grad f_i``: uncentred second moments of the per-example gradients.

    No per-example gradient is formed: ``F v = 1/n J^T J v`` with the Jacobian of the ``n`` losses.

    Args:
        problem: model, loss and data.
    """

    def _term(self, v: Vector) -> Term:
        return lambda batch: _gauss_newton(batch.losses(), self.problem.parameters, lambda losses, Jv: Jv, v)


class GradientCovariance(Operator):
    """``V = 1/n sum_i (g_i - g)(g_i - g)^T``, ``g`` the mean gradient; a product takes one more pass for ``g``.

    ``V v = 1/n J^T (J v - <g, v>)``. Population covariance: times ``n / (n - 1)`` it is unbiased for the distribution
    that the examples were drawn from.

    Args:
        problem: model, loss and data.
    """

    def _term(self, v: Vector) -> Term:
        gv = self.problem.gradient().dot(v)
        return lambda batch: _gauss_newton(
            batch.losses(), self.problem.parameters, lambda losses, Jv: Jv - gv.to(Jv), v
        )


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with eager, sdpa_kernel(SDPBackend.MATH):
        yield


def _gauss_newton(z: Tensor, w: Sequence[Tensor], B: Callable[[Tensor, Tensor], Tensor], v: Vector) -> Vector:
    """Return ``J^T B(z) J v``, ``J`` the Jacobian of ``z`` in ``w``; ``B`` gets a detached ``z`` and ``J v``."""
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
