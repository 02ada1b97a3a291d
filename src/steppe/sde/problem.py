"""A finite sum that knows the gradient of every example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from steppe.batch import Batch, leaves
from steppe.engine.replay import RandomState, frozen_statistics

ExampleLoss = Callable[[Tensor, Any], Tensor]  # (x of shape (d,), one example's row of the data) -> ()


class SDEError(ValueError):
    """A mistake in what was asked for, or something that has no equation; the message names it."""


@dataclass(frozen=True)
class Problem:
    """``f(x) = (1/n) sum_i f_i(x)`` of a flat vector ``x``, with ``f_i(x) = loss(x, data[i])``.

    Args:
        loss: ``(x, row) -> f_i(x)``, a tensor of shape ``()``, in torch operations that :func:`torch.func.vmap` takes.
        data: nested tensors with a common first dimension, the ``n`` examples.

    Raises:
        SDEError: ``data`` is empty, or holds anything but tensors with a common first dimension.

    Example:
        >>> X, y = torch.randn(6, 2), torch.randn(6)
        >>> problem = Problem(lambda x, row: (row[0] @ x - row[1]) ** 2 / 2, (X, y))
        >>> problem.gradients(torch.zeros(2)).shape
        torch.Size([6, 2])
    """

    loss: ExampleLoss
    data: Any

    def __post_init__(self) -> None:
        try:
            Batch(nn.Identity(), lambda model, data: data, self.data)  # the same demands on data
        except (TypeError, ValueError) as error:
            raise SDEError(str(error)) from None

    def __len__(self) -> int:
        return len(leaves(self.data)[0])

    def losses(self, x: Tensor) -> Tensor:
        """``f_i(x)``, shape ``(n,)``."""
        return self._map(self.loss)(x, self.data)

    def gradients(self, x: Tensor) -> Tensor:
        """``grad f_i(x)``, shape ``(n, d)``."""
        return self._map(grad(self.loss))(x, self.data)

    def hessians(self, x: Tensor) -> Tensor:
        """The Hessian of every ``f_i`` at ``x``, shape ``(n, d, d)``: for small problems."""
        return self._map(jacrev(grad(self.loss)))(x, self.data)

    def check(self, x: Tensor) -> None:
        """See that every example has one finite loss and a finite gradient at ``x``, shape ``(d,)``.

        Raises:
            SDEError: it has not; the message says what it has.
        """
        try:
            losses, gradients = self.losses(x), self.gradients(x)
        except (RuntimeError, ValueError) as error:
            raise SDEError(
                "loss must give one number an example, from deterministic torch operations that vmap takes (batch "
                f"normalisation or dropout in training mode? call model.eval()): {error}"
            ) from error
        if losses.shape != (len(self),):
            raise SDEError(f"loss must give one number an example, got shape {tuple(losses.shape[1:])} for each")
        bad = ~(losses.isfinite() & gradients.isfinite().all(1))
        if bad.any():
            i = int(bad.nonzero()[0])
            what = "loss" if not losses[i].isfinite() else "gradient"
            raise SDEError(f"the {what} of example {i} is not finite at x")

    def _map(self, f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mapped: Callable[..., Tensor] = vmap(f, in_dims=(None, 0))
        return mapped


def problem_of(batch: Batch) -> tuple[Problem, Tensor]:
    """A model and its data as a :class:`Problem` of the flat vector of its trainable parameters, and that vector.

    Raises:
        SDEError: the loss is not one number an example, is not finite, or examples influence one another (batch
            normalisation in training mode); the model draws random numbers (dropout: call ``model.eval()``).

    Example:
        >>> problem, x = problem_of(Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), inputs, targets))
    """
    named = {name: p for name, p in batch.model.named_parameters() if p.requires_grad}
    if not named:
        raise SDEError("the model has no parameter that requires a gradient")
    module, sizes = _Losses(batch), [p.numel() for p in named.values()]

    def loss(x: Tensor, row: Any) -> Tensor:
        parts = zip(named.items(), x.split(sizes), strict=True)
        parameters = {f"model.{name}": part.view(p.shape) for (name, p), part in parts}
        one: Tensor = functional_call(
            module, parameters, (torch.utils._pytree.tree_map(lambda t: t.unsqueeze(0), row),)
        )
        return one.squeeze(0)

    problem = Problem(loss, batch.data)
    x = torch.cat([p.detach().flatten() for p in named.values()])
    random = RandomState.now({p.device for p in named.values() if p.device.type != "cpu"})
    try:
        with frozen_statistics(batch.model.modules()):
            together = batch.losses().detach()
            problem.check(x)
    except SDEError:
        raise
    except ValueError as error:
        raise SDEError(str(error)) from None
    finally:
        random.restore()
    if not torch.allclose(together, problem.losses(x), rtol=1e-3, atol=1e-5):
        raise SDEError("an example's loss depends on the other examples: batch normalisation? call model.eval()")
    return problem, x


class _Losses(nn.Module):
    """The losses of a batch as a module, so that its parameters can be replaced."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.model, self.loss = batch.model, batch.loss

    def forward(self, data: Any) -> Tensor:
        losses: Tensor = self.loss(self.model, data)
        return losses


def quadratic(A: Tensor, b: Tensor) -> Problem:
    """``f_i(x) = x^T A_i x / 2 + b_i^T x`` with symmetric ``A``, shape ``(n, d, d)``, and ``b``, shape ``(n, d)``."""
    return Problem(lambda x, row: 0.5 * x @ row["A"] @ x + row["b"] @ x, {"A": A, "b": b})


def logistic(X: Tensor, y: Tensor, decay: float = 0.05) -> Problem:
    """``f_i(x) = log(1 + exp(-y_i X_i^T x)) + decay / 2 norm(x)^2``, ``y_i`` in -1, 1: smooth and not quadratic."""
    return Problem(
        lambda x, row: nn.functional.softplus(-row["y"] * (row["X"] @ x)) + decay / 2 * (x @ x), {"X": X, "y": y}
    )
