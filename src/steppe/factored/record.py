"""The first pass, recorded: gradients of every example or micro-batch, as factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.factored.black_box import black_boxes
from steppe.factored.cost import NORMS, TWO_PASSES, WEIGHTED, Cost
from steppe.factored.gradients import Gradients, gradients
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import fall_back, plan_for, refusal
from steppe.factored.tape import Look
from steppe.factored.terms import Factored, squared_norms
from steppe.oracle import Oracle
from steppe.replay import RandomState
from steppe.vector import Vector


@dataclass
class Factors:
    """One batch's first pass at ``w``; gradients are those of the mean loss over an example or a micro-batch."""

    look: Look
    n: int
    parameters: Sequence[Tensor]
    g: Vector  # of the mean loss; no entries where it was not asked for
    examples: Gradients | None = None  # every example's gradient, between norms and their weighted sum

    def of(self, parts: Parts, cost: Cost = TWO_PASSES, rho: Sequence[float] | None = None) -> Gradients:
        """Matrices and other parameters of every part, as contributions to the batch's mean."""
        with torch.no_grad():
            return gradients(self.look, parts, cost, rho)

    def norms(self, parts: Parts) -> Tensor:
        """``norm(G_k)`` of every part over all perturbed parameters together, shape ``(k,)``."""
        return self._norms(parts, self.of(parts, NORMS))

    def by_example(self) -> Tensor:
        """``norm(grad f_i)``, shape ``(n,)``; :meth:`weighted` may follow."""
        parts = Parts(self.n, 1)
        self.examples = self.of(parts, WEIGHTED)
        return self._norms(parts, self.examples)

    def _norms(self, parts: Parts, gradients: Gradients) -> Tensor:
        matrices, small = gradients
        with torch.no_grad():
            squares = squared_norms(matrices.values(), small.values())
            return self.n / parts.sizes(squares) * squares.clamp_min(0).sqrt()

    def weighted(self, p: Tensor) -> Vector:
        """``sum_i p_i grad f_i`` on the perturbed parameters, after :meth:`by_example`: no backward, no other pass."""
        assert self.examples is not None
        (matrices, small), self.examples = self.examples, None
        made: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad():
            c = self.n * p
            for i, gradient in matrices.items():
                made[i] = gradient.weighted(c).reshape(self.parameters[i].shape)
                if isinstance(gradient, Factored) and gradient.bias is not None:
                    made[gradient.bias] = gradient.weighted_bias(c)
            for i, t in small.items():
                made[i] = (c.to(t.dtype) @ t.flatten(1)).reshape(self.parameters[i].shape)
        return Vector(made)

    def scale(self, c: Tensor) -> None:
        """Multiply every example's loss by ``c_i``: its gradients follow."""
        for site in self.look.sites:
            delta = site.deltas[0]
            rows = delta.shape[: len(site.leading)].numel()
            assert site.layout is not None
            c_rows = c[site.layout.example_of_row(rows, c.device)].to(delta.dtype)
            site.deltas[0] = delta * c_rows.reshape(*site.leading, *[1] * (delta.dim() - len(site.leading)))


def factors_of(f: Oracle, uses_g: bool = False) -> Factors | None:
    """Run the first pass and record it; ``None`` where the model does not factor.

    Raises:
        ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
    """
    if not f.parallel:
        return None
    batch = f.batch("its examples' gradients")
    plan = plan_for(f, batch)
    reason = plan.reason
    if not reason or (plan.mixes and f.parallel is True):
        before = RandomState.now(f.point.devices)
        try:
            look = Look(plan.tracked, OPERATIONS, plan.pool)
            wrt = None if uses_g else [False] * len(f.point.parameters)
            g = f.grad(wrt=wrt, under=black_boxes(batch.model, look))
            plan.apply(look)
            return Factors(look, len(batch), f.point.parameters, g)
        except Exception as error:  # the serial loop will raise it again, if it is the model's own
            reason = fall_back(f, batch, error, before)
    if f.parallel is True:
        raise refusal(reason)
    return None
