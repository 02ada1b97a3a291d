"""m-SAM written with ``torch.func``: the baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

Weights = dict[str, Tensor]


class VmapSAM:
    """m-SAM by ``vmap(grad)``, which keeps every micro-batch's gradient and perturbed weights at once.

    Args:
        base: the base optimizer.
        model: its model.
        loss: ``(model, data) -> losses``, one an example.
        m: micro-batch size; divides the batch.
        rho: the radius.
    """

    def __init__(
        self, base: torch.optim.Optimizer, model: nn.Module, loss: Callable[..., Tensor], m: int, rho: float = 0.05
    ) -> None:
        self.base, self.model, self.loss, self.m, self.rho = base, model, loss, m, rho

    def mean_loss(self, weights: Weights, data: Any) -> Tensor:
        """Return the mean loss of one micro-batch."""
        return self.loss(lambda *inputs: functional_call(self.model, weights, inputs), data).mean()

    def step(self, data: tuple[Tensor, ...]) -> None:
        """Make one step."""
        parameters = dict(self.model.named_parameters())
        w = {name: p.detach() for name, p in parameters.items()}
        parts = tuple(t.reshape(-1, self.m, *t.shape[1:]) for t in data)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
            g = vmap(grad(self.mean_loss), (None, 0))(w, parts)
            norms = torch.stack([t.flatten(1).square().sum(1) for t in g.values()]).sum(0).sqrt()
            w_adv = {n: w[n] + (self.rho / norms).reshape(-1, *[1] * w[n].dim()) * g[n] for n in w}
            del g
            g_adv = vmap(grad(self.mean_loss), (0, 0))(w_adv, parts)
        for name, p in parameters.items():
            p.grad = g_adv[name].mean(0)
        self.base.step()
