"""Whether and how a model's micro-batch gradients factor: tried once, on real data, and checked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.factored.black_box import black_boxes
from steppe.factored.gradients import gradients
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Layout, Parts, layouts
from steppe.factored.tape import CannotFactor, Look, See, Site, Tracked
from steppe.factored.terms import Lookup
from steppe.oracle import Oracle
from steppe.vector import wide


@dataclass(frozen=True)
class Plan:
    """The layout of every use of a parameter, in order; or why there is none."""

    tracked: Tracked
    layouts: tuple[Layout, ...] = ()
    reason: str = ""
    mixes: bool = False  # examples influence one another: batch normalisation, a loss over pairs
    cost: float = 1.0  # of plain SAM in shared passes, in units of its usual way

    def apply(self, look: Look) -> None:
        """Give the sites of a pass their layouts.

        Raises:
            CannotFactor: the pass is not the one that was rehearsed.
        """
        look.check()
        if len(look.sites) != len(self.layouts):
            raise CannotFactor("the forward pass uses other parameters than when it was rehearsed")
        for site, layout in zip(look.sites, self.layouts, strict=True):
            site.layout = layout


def tracked_of(f: Oracle, batch: Batch) -> Tracked:
    """The perturbed parameters of the model."""
    names = {id(p): name for name, p in batch.model.named_parameters()}
    index = {
        id(p): i
        for i, (p, rho) in enumerate(zip(f.point.parameters, f.rho.values, strict=True))
        if rho and p.requires_grad
    }
    return Tracked(index, {i: names.get(p, f"parameter {i}") for p, i in index.items()}, len(batch))


def rehearsed(f: Oracle, batch: Batch) -> Plan:
    """The plan for this batch's model, data shape and perturbed parameters."""
    tracked = tracked_of(f, batch)
    reason = _unfit(batch.model)
    if reason:
        return Plan(tracked, reason=reason)
    for _ in range(2):
        look = Look(tracked, OPERATIONS)
        try:
            g, weights = _two_backwards(f, batch, look)
            if not look.sites:
                raise CannotFactor("no perturbed parameter takes part in the loss")
            free = _free(look, tracked.n)
            if free - tracked.free:  # positions: repeat them for every example, and look again
                tracked = replace(tracked, free=tracked.free | free)
                continue
            found = [_layout(site, weights, look) for site in look.sites]
            plan = Plan(tracked, tuple(layout for layout, _ in found))
            mixing = [label for _, label in found if label]
            if mixing:
                return replace(plan, mixes=True, reason=f"examples influence one another at {mixing[-1]}")
            plan.apply(look)
            _compare(look, f, g)
            _see_zero(f, batch, look, g)
            return replace(plan, cost=_cost(look))
        except CannotFactor as error:
            return Plan(tracked, reason=str(error))
        except Exception as error:  # the model does not run under the tape: the serial loop will say what is wrong
            return Plan(tracked, reason=f"{type(error).__name__}: {error}")
    return Plan(tracked, reason="rows of a parameter belong to no example")


def away(f: Oracle) -> AbstractContextManager[None]:
    """Passes inside do not count as passes at ``w``."""
    return nullcontext() if f.is_away else f.away()


def _two_backwards(f: Oracle, batch: Batch, look: Look) -> tuple[list[Tensor | None], Tensor]:
    """One forward; the mean's backward, and that of a sum with random weights, which tells whose rows are whose."""
    with away(f), f.passing():
        with black_boxes(batch.model, look):
            losses = batch.losses()
        random = torch.Generator().manual_seed(0)
        weights = (torch.rand(len(batch), generator=random) + 0.1).to(losses)
        losses.mean().backward(retain_graph=True)
        g = [None if p.grad is None else p.grad.detach().clone() for p in f.point.parameters]
        (losses @ weights / len(batch)).backward()
    return g, weights


def _free(look: Look, n: int) -> set[int]:
    return {i for i, site in enumerate(look.sites) if not layouts(n, site.leading)}


def _layout(site: Site, weights: Tensor, look: Look) -> tuple[Layout, str]:
    """The layout in which the second backward is the first times each example's weight; and who mixes, if none is."""
    if len(site.deltas) != 2:
        raise CannotFactor(f"{look.label(site)} has no gradient in this pass")
    first, second = (wide(d.reshape(-1, *d.shape[len(site.leading) :])).flatten(1) for d in site.deltas)
    best: tuple[float, Layout] | None = None
    for layout in layouts(len(weights), site.leading):
        w = wide(weights)[layout.example_of_row(len(first), first.device), None]
        error = float((second - w * first).norm() / second.norm().clamp_min(1e-30))
        if best is None or error < best[0]:
            best = error, layout
    assert best is not None
    tolerance = 1e-3 if wide(site.deltas[0]) is site.deltas[0] else 3e-2
    return best[1], "" if best[0] < tolerance else look.label(site)


def _compare(look: Look, f: Oracle, g: list[Tensor | None]) -> None:
    """The factors' gradients add up to autograd's, for every parameter."""
    parts = Parts(look.tracked.n, look.tracked.n)
    matrices, small = gradients(look, parts, whole=True)
    for i, name in look.tracked.names.items():
        if i in matrices:
            ours = matrices[i].full()[0][0]
        elif i in small:
            ours = small[i][0]
        else:
            ours = None
        _check_close(ours, g[i], g, 0.3 if _is_low(look) else 1e-3, name)


def _is_low(look: Look) -> bool:
    return any(wide(site.deltas[0]) is not site.deltas[0] for site in look.sites)


def _check_close(
    ours: Tensor | None, expected: Tensor | None, g: list[Tensor | None], tolerance: float, name: str
) -> None:
    if (ours is None) != (expected is None):
        raise CannotFactor(f"{name} takes part in a way that was not seen")
    if ours is None or expected is None:
        return
    total = sum(float(wide(t).norm()) ** 2 for t in g if t is not None) ** 0.5
    error = float((wide(ours).reshape(expected.shape) - wide(expected)).norm())
    # in low precision two orders of summation differ by some percent, and between two forwards a ReLU may flip: only
    # what is plainly wrong is told
    if not error <= tolerance * (float(wide(expected).norm()) + 1e-2 * total):
        raise CannotFactor(f"the factors of {name} do not add up to its gradient")


def _unfit(model: nn.Module) -> str:
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return "the model is compiled"
        if type(module).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
            return f"the model is wrapped in {type(module).__name__}"
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        return "parameters are sharded"
    return ""


def _cost(look: Look) -> float:
    """Multiplications of a step with one micro-batch over those of two forwards and backwards, from shapes.

    Products with factors save a weight gradient and pay Gram matrices; gradients held whole save nothing.
    """
    parts = Parts(look.tracked.n, look.tracked.n)
    with torch.no_grad():
        matrices, _ = gradients(look, parts)
    usual = shared = 0.0
    for gradient in matrices.values():
        for term in gradient.terms:
            if isinstance(term, Lookup):
                continue
            rows, height, width = term.shape(parts)
            usual += 6.0 * rows * height * width
            gram = 5.0 * rows * height * width + 3.0 * rows * rows * (height + width)
            shared += 6.0 * rows * height * width if gradient.whole else gram
    return shared / usual if usual else 1.0


def _see_zero(f: Oracle, batch: Batch, look: Look, g: list[Tensor | None]) -> None:
    """The second pass with ``eps = 0`` runs, and gives the first one's gradients."""
    parts = Parts(look.tracked.n, max(1, look.tracked.n // 2))
    with torch.no_grad():
        matrices, small = gradients(look, parts)
        zero = torch.zeros(parts.k, dtype=torch.float32, device=look.sites[0].deltas[0].device)
        see = See(
            look.tracked,
            OPERATIONS,
            look.sites,
            parts,
            {i: (gradient, zero) for i, gradient in matrices.items()},
            {i: torch.zeros_like(t) for i, t in small.items()},
        )
    with away(f), f.passing():
        with black_boxes(batch.model, see):
            losses = batch.losses()
        losses.mean().backward()
        for i, name in look.tracked.names.items():
            _check_close(f.point.parameters[i].grad, g[i], g, 0.3 if _is_low(look) else 5e-2, name)
