"""The first pass, recorded: gradients of every example or micro-batch, as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.factored.black_box import black_boxes
from steppe.factored.gradients import gradients
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import fall_back, plan_for, refusal
from steppe.factored.tape import Look
from steppe.factored.terms import Gradient
from steppe.oracle import Oracle
from steppe.replay import RandomState
from steppe.vector import Vector, wide


@dataclass
class Factors:
    """One batch's first pass at ``w``; gradients are those of the mean loss over an example or a micro-batch."""

    look: Look
    n: int
    parameters: Sequence[Tensor]
    g: Vector  # of the mean loss; no entries where it was not asked for

    def of(self, parts: Parts, products: int = 3) -> tuple[Mapping[int, Gradient], Mapping[int, Tensor]]:
        """Matrices and other parameters of every part, as contributions to the batch's mean."""
        with torch.no_grad():
            return gradients(self.look, parts, products=products)

    def norms(self, parts: Parts) -> Tensor:
        """``norm(G_k)`` of every part over all perturbed parameters together, shape ``(k,)``."""
        total = sum(self.squares(*self.of(parts, products=1)).values())
        assert isinstance(total, Tensor)
        return self.n / parts.sizes(total) * total.clamp_min(0).sqrt()

    @staticmethod
    def squares(matrices: Mapping[int, Gradient], small: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """By parameter, the squared norm of every part's contribution, shape ``(k,)``."""
        with torch.no_grad():
            squares = {i: gradient.squares() for i, gradient in matrices.items()}
            return squares | {i: wide(t).flatten(1).square().sum(1) for i, t in small.items()}

    def by_example(self) -> Tensor:
        """``norm(grad f_i)``, shape ``(n,)``."""
        return self.norms(Parts(self.n, 1))

    def scale(self, c: Tensor) -> None:
        """Multiply every example's loss by ``c_i``: its gradients follow."""
        for site in self.look.sites:
            delta = site.deltas[0]
            rows = delta.shape[: len(site.leading)].numel()
            assert site.layout is not None
            c_rows = c[site.layout.example_of_row(rows, c.device)].to(delta.dtype)
            site.deltas[0] = delta * c_rows.reshape(*site.leading, *[1] * (delta.dim() - len(site.leading)))

    def weighted(self, p: Tensor) -> Vector:
        """``sum_i p_i grad f_i`` on the perturbed parameters: one weight-gradient pass, no backward."""
        with torch.no_grad():
            self.scale(self.n * p)
            matrices, small = gradients(self.look, Parts(self.n, self.n), whole=True)
            made: list[Tensor | None] = [None] * len(self.parameters)
            for i, gradient in matrices.items():
                made[i] = gradient.full()[0][0].reshape(self.parameters[i].shape)
            for i, t in small.items():
                made[i] = t[0].reshape(self.parameters[i].shape)
        return Vector(made)


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
            look = Look(plan.tracked, OPERATIONS)
            wrt = None if uses_g else [False] * len(f.point.parameters)
            g = f.grad(wrt=wrt, under=black_boxes(batch.model, look))
            plan.apply(look)
            return Factors(look, len(batch), f.point.parameters, g)
        except Exception as error:  # the serial loop will raise it again, if it is the model's own
            reason = fall_back(f, batch, error, before)
    if f.parallel is True:
        raise refusal(reason)
    return None
