"""Finite sums with per-example gradients and Hessians."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jacrev, vmap

from steppe.batch import Batch
from steppe.engine.functional import functional
from steppe.engine.nested import Examples, leaves, mapped
from steppe.engine.replay import RandomState, frozen_statistics

ExampleLoss = Callable[[Tensor, Any], Tensor]  # (x of shape (d,), one example's row of the data) -> ()


class SDEError(ValueError):
    """An error for wrong arguments, and for methods that have no equation; the message names them."""


@dataclass(frozen=True)
class FiniteSum:
    """``f(x) = (1/n) sum_i f_i(x)`` of a flat vector ``x``, with ``f_i(x) = loss(x, data[i])``.

    Args:
        loss: ``(x, row) -> f_i(x)``, a tensor of shape ``()``, in torch operations that :func:`torch.func.vmap` takes.
        data: a nested tuple, list or dict of tensors with a common first dimension, the ``n`` examples.

    Raises:
        SDEError: ``data`` is empty, or cannot be cut into examples.

    Example:
        >>> X, y = torch.randn(6, 2), torch.randn(6)
        >>> problem = FiniteSum(lambda x, row: (row[0] @ x - row[1]) ** 2 / 2, (X, y))
        >>> problem.gradients(torch.zeros(2)).shape
        torch.Size([6, 2])
    """

    loss: ExampleLoss
    data: Any

    def __post_init__(self) -> None:
        try:
            Examples.of(self.data)
        except (TypeError, ValueError) as error:
            raise SDEError(str(error)) from None

    def __len__(self) -> int:
        return len(next(leaves(self.data)))

    def losses(self, x: Tensor) -> Tensor:
        """Return every ``f_i(x)``, shape ``(n,)``."""
        return self._each(self.loss, x)

    def gradients(self, x: Tensor) -> Tensor:
        """Return every ``grad f_i(x)``, shape ``(n, d)``."""
        return self._each(grad(self.loss), x)

    def hessians(self, x: Tensor) -> Tensor:
        """Return the Hessian of every ``f_i`` at ``x``, shape ``(n, d, d)``, for small problems."""
        return self._each(jacrev(grad(self.loss)), x)

    def _each(self, f: Callable[..., Tensor], x: Tensor) -> Tensor:
        values: Tensor = vmap(f, in_dims=(None, 0))(x, self.data)
        return values

    def check(self, x: Tensor) -> None:
        """Raise :class:`SDEError` unless every example has one finite loss and a finite gradient at ``x``."""
        try:
            losses, gradients = self.losses(x), self.gradients(x)
        except (RuntimeError, ValueError) as error:
            raise SDEError(
                "loss must give one number per example, from deterministic torch operations that vmap takes (batch "
                f"normalisation or dropout in training mode? call model.eval()): {error}"
            ) from error
        if losses.shape != (len(self),):
            raise SDEError(f"loss must give one number per example, got shape {tuple(losses.shape[1:])} for each")
        for what, finite in (("loss", losses.isfinite()), ("gradient", gradients.isfinite().all(1))):
            if not finite.all():
                raise SDEError(f"the {what} of example {int((~finite).nonzero()[0])} is not finite at x")


def problem_of(batch: Batch) -> tuple[FiniteSum, Tensor]:
    """Return a batch's losses as a :class:`FiniteSum` of the flat vector of trainable parameters, and that vector.

    Raises:
        SDEError: the loss is not one number per example, or not finite; examples influence one another (batch
            normalisation in training mode); or the model draws random numbers (dropout: call ``model.eval()``).

    Example:
        >>> problem, x = problem_of(Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), inputs, targets))
    """
    named = {name: p for name, p in batch.model.named_parameters() if p.requires_grad}
    if not named:
        raise SDEError("the model has no parameter that requires a gradient")
    losses, sizes = functional(batch.model, batch.loss), [p.numel() for p in named.values()]

    def loss(x: Tensor, row: Any) -> Tensor:
        parts = zip(named.items(), x.split(sizes), strict=True)
        w = {name: part.view(p.shape) for (name, p), part in parts}
        return losses(w, mapped(lambda t: t.unsqueeze(0), row)).squeeze(0)

    problem = FiniteSum(loss, batch.data)
    x = torch.cat([p.detach().flatten() for p in named.values()])
    random = RandomState.now({p.device for p in named.values() if p.device.type != "cpu"})
    try:
        with frozen_statistics(batch.model.modules()):
            together = batch.losses().detach()
            problem.check(x)
    except ValueError as error:
        raise SDEError(str(error)) from None
    finally:
        random.restore()
    if not torch.allclose(together, problem.losses(x), rtol=1e-3, atol=1e-5):
        raise SDEError("an example's loss depends on the other examples: batch normalisation? call model.eval()")
    return problem, x


def quadratic(A: Tensor, b: Tensor) -> FiniteSum:
    """Return ``f_i(x) = x^T A_i x / 2 + b_i^T x``, ``A`` symmetric, shape ``(n, d, d)``, ``b`` of shape ``(n, d)``."""
    return FiniteSum(lambda x, row: 0.5 * x @ row["A"] @ x + row["b"] @ x, {"A": A, "b": b})


def logistic(X: Tensor, y: Tensor, decay: float = 0.05) -> FiniteSum:
    """Return ``f_i(x) = log(1 + exp(-y_i X_i^T x)) + decay / 2 norm(x)^2`` with ``y_i`` in -1, 1."""

    def loss(x: Tensor, row: dict[str, Tensor]) -> Tensor:
        return nn.functional.softplus(-row["y"] * (row["X"] @ x)) + decay / 2 * (x @ x)

    return FiniteSum(loss, {"X": X, "y": y})
