"""The first pass, recorded: gradients of every example or micro-batch, as factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.engine.vector import Vector
from steppe.factored.cost import HELD, NORMS, TWO_PASSES, Cost
from steppe.factored.gradients import Gradients, gradients
from steppe.factored.held import Held
from steppe.factored.parts import Parts
from steppe.factored.plan import Entry
from steppe.factored.tape import Look
from steppe.factored.terms import Factored, squared_norms


@dataclass
class Factors:
    """One batch's first pass at ``w``; gradients are those of the mean loss over an example or a micro-batch."""

    look: Look
    n: int
    parameters: Sequence[Tensor]
    g: Vector  # of the mean loss; no entries where it was not asked for
    entry: Entry
    loss_scale: Tensor | float = 1.0  # of the losses of this pass, and so of what it has recorded
    gathered: Gradients | None = None  # what a harvest has made during the pass; then nothing else can be

    def of(self, parts: Parts, cost: Cost = TWO_PASSES, rho: Sequence[float] | None = None) -> Gradients:
        """Matrices and other parameters of every part, as contributions to the batch's mean, times the loss scale."""
        with torch.no_grad():
            return gradients(self.look, parts, cost, rho)

    def norms(self, parts: Parts) -> Tensor:
        """``norm(G_k)`` of every part over all perturbed parameters together, shape ``(k,)``."""
        return self._norms(parts, self.of(parts, NORMS))

    def by_example(self) -> Tensor:
        """``norm(grad f_i)``, shape ``(n,)``, of gathered examples; :meth:`weighted` may follow."""
        assert self.gathered is not None
        return self._norms(Parts(self.n, 1), self.gathered)

    def _norms(self, parts: Parts, gradients: Gradients) -> Tensor:
        matrices, small = gradients
        with torch.no_grad():
            squares = squared_norms(matrices.values(), small.values())
            return self.to_own_mean(parts, squares) * squares.clamp_min(0).sqrt()

    def to_own_mean(self, parts: Parts, like: Tensor) -> Tensor:
        """What makes each part's contribution the gradient of its own mean loss, shape ``(k,)``."""
        return self.n / self.loss_scale / parts.sizes(like)

    def weighted(self, p: Tensor) -> Vector:
        """``sum_i p_i grad f_i`` on the perturbed parameters, after :meth:`by_example`: no backward, no other pass."""
        assert self.gathered is not None
        (matrices, small), self.gathered = self.gathered, None
        made: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad():
            c = self.n * p
            for i, gradient in matrices.items():
                made[i] = gradient.weighted(c).reshape(self.parameters[i].shape)
                if isinstance(gradient, Factored) and gradient.bias is not None:
                    made[gradient.bias] = gradient.weighted_bias(c)
            for i, t in small.items():
                made[i] = (c.to(t.dtype) @ t.flatten(1)).reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def mean(self) -> Vector:
        """The gradient of the mean loss on the perturbed parameters: one weight-gradient pass, no backward."""
        matrices, small = self.of(Parts(self.n, self.n), HELD)
        made: list[Tensor | None] = [None] * len(self.parameters)
        for i, gradient in matrices.items():
            assert isinstance(gradient, Held)
            made[i] = gradient.chunks[0][0].reshape(self.parameters[i].shape).clone()  # its memory serves the next
        for i, t in small.items():
            made[i] = t[0].reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def scale(self, c: Tensor) -> None:
        """Multiply every example's loss by ``c_i``: its gradients follow."""
        for site in self.look.sites:
            delta = site.deltas[0]
            rows = delta.shape[: len(site.leading)].numel()
            assert site.layout is not None
            c_rows = c[site.layout.example_of_row(rows, c.device)].to(delta.dtype)
            site.deltas[0] = delta * c_rows.reshape(*site.leading, *[1] * (delta.dim() - len(site.leading)))
