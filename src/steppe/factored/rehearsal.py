"""Whether and how a model's micro-batch gradients factor: tried once, on real data, and checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches
from steppe.engine.grads import drop
from steppe.engine.oracle import Oracle
from steppe.engine.passes import Passes
from steppe.engine.replay import RandomState
from steppe.engine.vector import wide
from steppe.factored.black_box import black_boxes
from steppe.factored.cost import HELD, TWO_PASSES
from steppe.factored.embedding import Embedding
from steppe.factored.gradients import choose, gradients
from steppe.factored.held import Held, Pool
from steppe.factored.lookups import Lookup
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Layout, Parts, layouts
from steppe.factored.still import NoDropout, shaken
from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small, Tracked, Unsure

Gradients = list[Tensor | None]  # by parameter


@dataclass(frozen=True)
class Plan:
    """The layout of every use of a parameter, in order; or why there is none."""

    tracked: Tracked
    uses: tuple[Any, ...] = ()
    layouts: tuple[Layout, ...] = ()
    reason: str = ""
    final: bool = True  # whether another batch could change the verdict
    mixes: bool = False  # batch normalisation: examples influence one another through whole-batch statistics
    pool: Pool = field(default_factory=Pool, compare=False)
    cost: float = 1.0  # of plain SAM in shared passes, in units of its usual way

    def apply(self, look: Look) -> None:
        """Give the sites of a pass their layouts.

        Raises:
            CannotFactor: the pass is not the one that was rehearsed.
        """
        if look.uses() != self.uses:
            raise CannotFactor("the forward pass is not the one that was rehearsed")
        for site, layout in zip(look.sites, self.layouts, strict=True):
            site.layout = layout


def tracked_of(f: Oracle, batch: Batch) -> Tracked:
    """The perturbed parameters of the model."""
    names = {id(p): name for name, p in batch.model.named_parameters()}
    index = {
        id(p): i
        for i, (p, rho) in enumerate(zip(f.passes.parameters.tensors, f.rho.values, strict=True))
        if rho and p.requires_grad
    }
    return Tracked(index, {i: names.get(p, f"parameter {i}") for p, i in index.items()}, len(batch))


def rehearsed(f: Oracle, batch: Batch) -> Plan:
    """The plan for this batch's model, data shape and perturbed parameters.

    Weights, gradients' slots, buffers and random streams are left as they were; state of the model that is no buffer
    sees some more passes.
    """
    tracked = tracked_of(f, batch)
    before = RandomState.now(f.passes.parameters.devices)
    try:
        _check_fit(batch, f)
        with f.passes.ranks.apart(), shaken(batch.model), NoDropout():
            return _Rehearsal(f, batch).plan(tracked)
    except CannotFactor as error:
        return Plan(tracked, reason=str(error), final=error.final)
    except Exception as error:  # the model does not run: the serial loop will say what is wrong
        return Plan(tracked, reason=described(error), final=False)
    finally:
        before.restore()


class _Rehearsal:
    """Passes that count for nothing."""

    def __init__(self, f: Oracle, batch: Batch) -> None:
        self.f, self.batch, self.n = f, batch, len(batch)
        self.passes = Passes(batch, f.passes.parameters)
        self.scale = float(batch.loss_scale(f.passes.parameters.tensors[0].detach()))  # of every loss here

    def plan(self, tracked: Tracked) -> Plan:
        """Look, find the layouts, and check everything that follows from them."""
        for _ in range(3):
            look = Look(tracked, OPERATIONS)
            losses, g, weights = self.two_backwards(look)
            if not look.sites:
                raise CannotFactor("no perturbed parameter takes part in the loss")
            low = any(wide(d) is not d for site in look.sites for d in site.deltas)
            rough = any(d.device.type != "cpu" for site in look.sites for d in site.deltas)  # TF32: 10 bits
            found = [_layout(site, weights, look, 0.3 if low else 1e-3) for site in look.sites]
            free = {i for i, (_, fits) in enumerate(found) if not fits and _may_be_free(look.sites[i])} - tracked.free
            if not free:
                break
            tracked = replace(tracked, free=tracked.free | free)  # positions: repeat them for every example
        plan = Plan(tracked, look.uses(), tuple(layout for layout, _ in found))
        if look.batch_norm:
            return replace(plan, mixes=True, reason="examples influence one another: batch normalisation")
        for site, (_, fits) in zip(look.sites, found, strict=True):
            if not fits:
                raise CannotFactor(f"examples influence one another at {look.label(site)}")
        for site in look.sites:
            del site.deltas[1:]
        look.check()
        plan.apply(look)
        self.check_losses_of_parts(losses, 5e-2 if low else 1e-2 if rough else 1e-3)
        self.check_sum(look, g, 0.3 if low else 3e-2 if rough else 1e-3)
        self.check_part(look, 0.3 if low else 5e-2)
        self.check_second_pass(look, g, 0.5 if low else 5e-2)
        return replace(plan, cost=_cost(look))

    def two_backwards(self, look: Look) -> tuple[Tensor, Gradients, Tensor]:
        """One forward; the mean's backward, and that of a sum with random weights, which tells whose rows are whose."""
        with self.passes.one(away=True):
            with black_boxes(self.batch.model, look):
                losses = self.batch.losses()
            if not losses.isfinite().all():
                raise Unsure("the losses of this batch are not finite")
            random = torch.Generator().manual_seed(0)
            order = torch.randperm(self.n, generator=random)
            weights = (2.0 ** (order % 5 - 4)).to(losses)  # powers of two commute with rounding, TF32's too
            g = self.first_backward(losses, look)
            (losses @ weights * (self.scale / self.n)).backward()
        return losses.detach(), g, weights

    def first_backward(self, losses: Tensor, look: Look) -> Gradients:
        """The mean's gradients, scaled to stay well within float16: a scaler has yet to find its own scale at first."""
        while True:
            (losses.sum() * (self.scale / self.n)).backward(retain_graph=True)
            g = self.gradients()
            if self.scale == 1 or all(float(t.abs().max()) < 1e3 for t in g if t is not None and t.numel()):
                return g
            self.scale = max(1.0, self.scale / 64)
            drop(self.f.passes.parameters.tensors)
            for site in look.sites:
                site.deltas.clear()

    def gradients(self) -> Gradients:
        """What backward has left."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.f.passes.parameters.tensors]

    def check_losses_of_parts(self, losses: Tensor, tolerance: float) -> None:
        """An example's loss is the same in another batch."""
        if self.n == 1:
            return
        cut = max(1, self.n // 3)
        with self.passes.one(away=True), torch.no_grad():
            halves = [self.batch.subset(torch.arange(a, b)).losses() for a, b in ((0, cut), (cut, self.n))]
        if not (torch.cat(halves) - losses).abs().max() <= tolerance * (losses.abs().max() + 1e-6):
            raise CannotFactor("the loss of an example depends on the other examples of its batch, or on chance")

    def check_sum(self, look: Look, g: Gradients, tolerance: float) -> None:
        """The factors' gradients add up to autograd's, for every parameter."""
        _check_close(self.of_part(look, self.n), g, look.tracked, tolerance)

    def check_part(self, look: Look, tolerance: float) -> None:
        """The first micro-batch's gradient from factors is the one that it has by itself."""
        m = max(1, self.n // 2)
        with self.passes.one(away=True):
            (self.batch.split(m)[0].losses().sum() * (self.scale / self.n)).backward()
            g = self.gradients()
        _check_close(self.of_part(look, m), g, look.tracked, tolerance)

    def of_part(self, look: Look, m: int) -> Gradients:
        """By parameter, what the first micro-batch of ``m`` contributes to the gradient."""
        with torch.no_grad():
            matrices, small = gradients(look, Parts(self.n, m), HELD)
        rows = {i: gradient.chunks[0][0] for i, gradient in matrices.items() if isinstance(gradient, Held)}
        rows |= {i: t[0] for i, t in small.items()}
        return [rows[i].reshape(p.shape) if i in rows else None for i, p in enumerate(self.f.passes.parameters.tensors)]

    def check_second_pass(self, look: Look, g: Gradients, tolerance: float) -> None:
        """The second pass with ``eps = 0`` runs, and gives the first one's gradients."""
        parts = Parts(self.n, max(1, self.n // 2))
        with torch.no_grad():
            matrices, small = gradients(look, parts, TWO_PASSES)
        zero = torch.zeros(parts.k, device=look.sites[0].deltas[0].device)
        big = {i: (gradient, zero) for i, gradient in matrices.items()}
        see = See(look.tracked, OPERATIONS, look.sites, parts, big, {i: torch.zeros_like(t) for i, t in small.items()})
        with self.passes.one(away=True):
            with black_boxes(self.batch.model, see):
                losses = self.batch.losses()
            (losses.sum() * (self.scale / self.n)).backward()
            _check_close(self.gradients(), g, look.tracked, tolerance)


def _may_be_free(site: Site) -> bool:
    """Whether rows of positions may belong to no example."""
    return isinstance(site.operation, Embedding) and (len(site.leading) == 1 or site.leading[0] == 1)


def _layout(site: Site, weights: Tensor, look: Look, tolerance: float) -> tuple[Layout, bool]:
    """The layout in which the second backward is nearest to the first times each example's weight; whether it fits."""
    if len(site.deltas) != 2:
        raise CannotFactor(f"{look.label(site)} has no gradient in this pass, or several")
    first, second = (wide(d.reshape(-1, *d.shape[len(site.leading) :])).flatten(1) for d in site.deltas)
    if not first.norm() > 0 or not first.isfinite().all():
        raise Unsure(f"the gradient at {look.label(site)} is zero or not finite for this batch")
    errors = {}
    for layout in layouts(len(weights), site.leading):
        w = wide(weights)[layout.example_of_row(len(first), first.device), None]
        errors[layout] = float((second - w * first).norm() / second.norm())
    if not errors:
        return Layout(1, 1), False
    best = min(errors, key=lambda layout: errors[layout])
    return best, errors[best] < tolerance


def _check_close(ours: Gradients, expected: Gradients, tracked: Tracked, tolerance: float) -> None:
    """In low precision two orders of summation differ by some percent, and between two forwards a ReLU may flip: the
    looser tolerances tell what is plainly wrong."""
    total = sum(float(wide(t).norm()) ** 2 for t in expected if t is not None) ** 0.5
    for i, name in tracked.names.items():
        a, b = ours[i], expected[i]
        if (a is None) != (b is None):
            raise CannotFactor(f"{name} takes part in a way that was not seen")
        if a is None or b is None:
            continue
        error = float((wide(a) - wide(b)).norm())
        if not error <= tolerance * (float(wide(b).norm()) + 1e-2 * total):
            raise CannotFactor(f"the factors of {name} do not add up to its gradient")


def _check_fit(batch: Batch, f: Oracle) -> None:
    model = batch.model
    if isinstance(batch, Batches):
        raise CannotFactor("the batch is accumulated: its examples' gradients are not all held at once")
    for module in batch.modules():
        if is_watched(module):
            hooks = module._backward_hooks or module._backward_pre_hooks
            raise CannotFactor(f"{type(module).__name__} has backward hooks" if hooks else "the model is compiled")
    if any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise CannotFactor("parameters are sharded")
    if len({p.device for p in f.passes.parameters.tensors}) > 1:
        raise CannotFactor("parameters are on several devices")
    if any(has_hooks(p) for p in f.passes.parameters.tensors):
        raise CannotFactor("parameters have gradient hooks")


def is_watched(module: nn.Module) -> bool:
    """Whether a module is compiled, or hooks see the gradients that pass it."""
    hooks = module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None or "_orig_mod" in module._modules


def described(error: Exception) -> str:
    """An error in a line of the log."""
    return f"{type(error).__name__}: {error}"


def has_hooks(p: Tensor) -> bool:
    """Whether a parameter's gradient is changed or used on its way."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


def _cost(look: Look) -> float:
    """Multiplications of a step with one micro-batch over those of two forwards and backwards, from shapes.

    Products with factors save a weight gradient and pay Gram matrices; gradients held whole save nothing.
    """
    parts = Parts(look.tracked.n, look.tracked.n)
    matrices: Matrices = {}
    small: Small = {}
    usual = shared = 0.0
    with torch.no_grad():
        for site in look.sites:
            site.operation.collect(site, matrices, small)
    for found in matrices.values():
        terms, whole = choose(found, parts, TWO_PASSES)
        for term in terms:
            if isinstance(term, Lookup):
                continue
            rows, height, width = term.shape(parts)
            usual += 6.0 * rows * height * width
            gram = 5.0 * rows * height * width + 3.0 * rows * rows * (height + width)
            shared += 6.0 * rows * height * width if whole else gram
    return shared / usual if usual else 1.0
