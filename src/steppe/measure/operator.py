"""Curvature matrices of size ``(d, d)``, never formed: only their products with vectors are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine.vector import Vector
from steppe.measure.problem import Problem
from steppe.measure.product import CentralDifference, DoubleBackward

Product = DoubleBackward | CentralDifference
Term = Callable[[Batch], Vector]  # a batch's part of the product with one vector: the sum over its examples


class Operator:
    """``A v = 1/n sum_i A_i v``, averaged over the examples of a problem, one batch at a time.

    Args:
        problem: model, loss and data.
        term: ``(problem, product, v)`` to the function that returns a batch's part of the sum.
        product: :class:`DoubleBackward`, or :class:`CentralDifference` for models that it does not support.

    Raises:
        TypeError: the model is compiled or sharded, and ``product`` is not :class:`CentralDifference`.
    """

    def __init__(
        self, problem: Problem, term: Callable[[Problem, Product, Vector], Term], product: Product | None = None
    ) -> None:
        self.problem, self.term, self.product = problem, term, product or DoubleBackward()
        compiled = any(hasattr(module, "_orig_mod") for module in problem.model.modules())
        sharded = any(hasattr(p, "device_mesh") for p in problem.parameters)
        if isinstance(self.product, DoubleBackward) and (compiled or sharded):
            raise TypeError(
                f"a {'compiled' if compiled else 'sharded'} model cannot be differentiated twice: "
                "pass product=CentralDifference()"
            )

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
        """Return the product with ``v``: a vector with one entry per parameter, or a tensor of shape ``(d,)``.

        Raises:
            ValueError: ``v`` has another shape.
        """
        if isinstance(v, Tensor):
            if v.shape != (self.shape[0],):
                raise ValueError(f"v must have shape {(self.shape[0],)}, got {tuple(v.shape)}")
            return self._flat(self @ self._unflat(v))
        if [t.shape if t is not None else p.shape for t, p in zip(v.tensors, self.like, strict=False)] != [
            p.shape for p in self.like
        ]:
            raise ValueError("v must have one entry per parameter, of the parameter's shape, or None")
        total = Vector([None] * len(self.like))
        term = self.term(self.problem, self.product, v)
        with self.problem.untouched():
            for batch in self.problem.batches():
                total = total + term(batch)
        return total / self.problem.n

    def _flat(self, v: Vector) -> Tensor:
        rows = zip(v.materialised(), self.like, strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in rows])

    def _unflat(self, t: Tensor) -> Vector:
        parts = t.split([p.numel() for p in self.like])
        return Vector([part.view_as(p).to(p) for part, p in zip(parts, self.like, strict=True)])


class Hessian(Operator):
    """``H = 1/n sum_i d^2 f_i / dw^2``.

    Example:
        >>> H = Hessian(Problem(model, criterion, loader))
        >>> Hv = H @ torch.randn(H.shape[0])
    """

    def __init__(self, problem: Problem, product: Product | None = None) -> None:
        super().__init__(problem, _hessian, product)


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
        super().__init__(problem, _gauss_newton, product)


class EmpiricalFisher(Operator):
    """``F = 1/n sum_i g_i g_i^T``, ``g_i = grad f_i``: uncentred second moments of the per-example gradients.

    No per-example gradient is formed: ``F v = 1/n J^T J v`` with the Jacobian of the ``n`` losses.
    """

    def __init__(self, problem: Problem, product: Product | None = None) -> None:
        super().__init__(problem, _fisher, product)


class GradientCovariance(Operator):
    """``V = 1/n sum_i (g_i - g)(g_i - g)^T``, ``g`` the mean gradient; a product takes one more pass for ``g``.

    ``V v = 1/n J^T (J v - <g, v>)``. Population covariance: times ``n / (n - 1)`` it is unbiased for the distribution
    that the examples were drawn from.
    """

    def __init__(self, problem: Problem, product: Product | None = None) -> None:
        super().__init__(problem, _covariance, product)


def _hessian(problem: Problem, product: Product, v: Vector) -> Term:
    return lambda batch: product.hessian(problem, lambda: batch.losses().sum(), v)


def _gauss_newton(problem: Problem, product: Product, v: Vector) -> Term:
    def on(batch: Batch) -> Vector:
        def B(z: Tensor, Jv: Tensor) -> Tensor:
            z = z.detach().requires_grad_()
            (dz,) = torch.autograd.grad(problem.criterion(batch, z).sum(), z, create_graph=True)
            return torch.autograd.grad(dz, z, Jv)[0] if dz.requires_grad else torch.zeros_like(z)

        return product.gauss_newton(problem, lambda: problem.outputs(batch), B, v)

    return on


def _fisher(problem: Problem, product: Product, v: Vector) -> Term:
    return lambda batch: product.gauss_newton(problem, batch.losses, lambda losses, Jv: Jv, v)


def _covariance(problem: Problem, product: Product, v: Vector) -> Term:
    gv = product.gradient(problem).dot(v)
    return lambda batch: product.gauss_newton(problem, batch.losses, lambda losses, Jv: Jv - gv.to(Jv), v)
