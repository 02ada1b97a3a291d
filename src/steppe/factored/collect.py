"""From the sites of the first pass to every micro-batch's gradients, held whole or as factors: by cost, from shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steppe.engine.vector import Vector
from steppe.factored.gradients import Factors, Gradient, Rows, Whole, squared_norms
from steppe.factored.maps import Convolved, Dense, Lookup
from steppe.factored.microbatches import MicroBatches
from steppe.factored.passes import CannotFactor, FirstPass, Matrices, Site, Small


@dataclass(frozen=True)
class Cost:
    """What is to be done with ``G_k`` (``height x width``, ``rows`` of factors a part).

    Attributes:
        products: how many products with the factors, of ``rows^2 (height + width)`` multiplications a part each: the
            Gram matrices, the perturbed forward and its backward.
        weighted: whether a weighted sum of the gradients is to follow, which takes factors another
            ``rows height width``.
        memory: how many multiplications the passes over a number of ``G_k`` in memory are worth.
    """

    products: int
    weighted: bool = False
    memory: int = 20

    def whole(self, rows: int, height: int, width: int) -> bool:
        """Return whether to hold ``G_k`` whole: ``rows height width`` to make, and passes over it in memory."""
        factors = self.products * rows * rows * (height + width) + self.weighted * rows * height * width
        return factors > (rows + self.memory) * height * width

    def table(self, rows: int, height: int) -> bool:
        """Return whether to hold the table of a lookup whole: where it has at most two rows a lookup."""
        return height <= 2 * rows


class HoldAll(Cost):
    """The choice to hold every gradient whole."""

    def whole(self, rows: int, height: int, width: int) -> bool:
        """Return ``True``."""
        return True

    def table(self, rows: int, height: int) -> bool:
        """Return ``True``."""
        return True


TWO_PASSES, NORMS, WEIGHTED, HELD = Cost(3, memory=50), Cost(1), Cost(1, weighted=True), HoldAll(0)


Gradients = tuple[Mapping[int, Gradient], Mapping[int, Tensor]]


class Collector:
    """Every micro-batch's gradients, gathered from the sites of the first pass.

    A parameter's are made when all its uses have come: in backward, while the gradient that has just been made is near
    and before the next one needs memory, or after it. The losses' mean over the batch was differentiated: these are its
    parts, ``n / m`` times too small as means over ``m``.

    Args:
        look: the recorded pass; its forward has ended when the first site is taken.
        parts: the micro-batches.
        cost: which matrices to hold whole.
        rho: by parameter; a bias rides along with the factors of its weight where both have the same.
    """

    def __init__(self, first: FirstPass, parts: MicroBatches, cost: Cost, rho: Sequence[float] | None = None) -> None:
        self.first, self.parts, self.cost, self.rho = first, parts, cost, rho
        self.terms: Matrices = {}
        self.by_example: Small = {}
        self.matrices: dict[int, Gradient] = {}

    @cached_property
    def uses(self) -> Counter[int | None]:
        """The number of uses of each parameter."""
        return Counter(i for site in self.first.sites for i in (site.weight, site.bias))

    def take(self, site: Site) -> None:
        """Add the contribution of one use."""
        site.layer.collect(site, self.terms, self.by_example)
        if site.weight is not None and len(self.terms.get(site.weight, ())) == self.uses[site.weight]:
            self.matrices[site.weight] = self.made(site.weight, self.terms.pop(site.weight))

    def made(self, i: int, terms: Sequence[Any]) -> Gradient:
        """Return the gradients of one matrix, whole or as factors."""
        terms, whole = choose(terms, self.parts, self.cost)
        biases = [t.bias for t in terms if isinstance(t, Dense) and t.bias is not None]
        unlike = any(self.uses[b] > 1 or (self.rho and self.rho[b] != self.rho[i]) for b in biases)
        if whole or len(terms) > 1 or unlike:
            terms = [_alone(t, self.by_example) for t in terms]
        if whole:
            return Whole(terms, self.parts, self.first.pool)
        if all(isinstance(t, Lookup) for t in terms):
            return Rows(terms, self.parts)
        return Factors(_multipliable(terms), self.parts)

    def gradients(self) -> Gradients:
        """Return the gradients of all matrices, whole or as factors, and of other parameters, ``(k, *shape)``."""
        for i in self.by_example.keys() & (self.matrices.keys() | self.terms.keys()):
            raise CannotFactor(f"{self.first.tracked.names[i]} is used both as a matrix and directly")
        return self.matrices, _by_part(self.by_example, self.parts)


def collected(first: FirstPass, parts: MicroBatches, cost: Cost, rho: Sequence[float] | None = None) -> Gradients:
    """Return what a :class:`Collector` gathers after the pass."""
    collector = Collector(first, parts, cost, rho)
    for site in first.sites:
        collector.take(site)
    return collector.gradients()


def choose(terms: Sequence[Any], parts: MicroBatches, cost: Cost) -> tuple[Sequence[Any], bool]:
    """Return the terms of a matrix, and whether to hold its gradients whole."""
    if any(isinstance(t, Convolved) for t in terms):
        if not all(isinstance(t, Convolved) for t in terms):
            raise CannotFactor("the weight of a convolution is used by something else, too")
        by_patches = all(_suits_patches(t, parts, cost) for t in terms)  # one order of columns for all
        return ([t.dense() for t in terms], False) if by_patches else (terms, True)
    rows = min(parts.m, parts.n) * sum(t.right.shape[1] for t in terms)
    dense = [t for t in terms if isinstance(t, Dense)]
    return terms, cost.whole(rows, *dense[0].size) if dense else cost.table(rows, terms[0].height)


def _suits_patches(term: Convolved, parts: MicroBatches, cost: Cost) -> bool:
    """Return whether the product of patches is cheaper than a convolution; it needs a single group."""
    rows, height, width = term.shape(parts)
    return term.spec.groups == 1 and not cost.whole(2 * rows, height, width)


def _multipliable(terms: Sequence[Any]) -> Sequence[Any]:
    """Return the terms in one dtype, and not in float16, in which their products overflow at 65504."""
    types = {t.right.dtype for t in terms}
    return [t.to(torch.float32) for t in terms] if len(types) > 1 or torch.float16 in types else terms


def _alone(term: Any, by_example: Small) -> Any:
    """Return a term without the gradient of the bias, which is added to those of other small parameters."""
    if not isinstance(term, Dense) or term.bias is None:
        return term
    by_example.setdefault(term.bias, []).append(term.left.sum(1))
    return replace(term, bias=None)


def _by_part(by_example: Small, parts: MicroBatches) -> dict[int, Tensor]:
    """Return the sums over uses and over each micro-batch, in one call for all parameters of a dtype."""
    total = {i: sum(ts[1:], ts[0]) for i, ts in by_example.items()}
    if len({(t.dtype, t.device) for t in total.values()}) > 1:
        return {i: parts.sums(t) for i, t in total.items()}
    if not total:
        return {}
    sums = parts.sums(torch.cat([t.flatten(1) for t in total.values()], 1))
    split = sums.split([t[0].numel() for t in total.values()], 1)
    return {i: s.unflatten(1, t.shape[1:]) for (i, t), s in zip(total.items(), split, strict=True)}


@dataclass
class Recorded:
    """One batch's first pass at ``w``; gradients are those of the mean loss over an example or a micro-batch."""

    first: FirstPass
    n: int
    parameters: Sequence[Tensor]
    g: Vector  # of the mean loss; no entries where it was not asked for
    loss_scale: Tensor | float = 1.0  # of the losses of this pass, and so of what it has recorded
    collected: Gradients | None = None  # what a collector has made, and freed the factors of, during the pass

    def of(self, parts: MicroBatches, cost: Cost = TWO_PASSES, rho: Sequence[float] | None = None) -> Gradients:
        """Return the gradients of every micro-batch, as contributions to the batch mean, times the loss scale."""
        with torch.no_grad():
            return collected(self.first, parts, cost, rho)

    def norms(self, parts: MicroBatches) -> Tensor:
        """Return ``norm(G_k)`` over all perturbed parameters together, shape ``(k,)``."""
        return self._norms(parts, self.of(parts, NORMS))

    def by_example(self) -> Tensor:
        """Return ``norm(grad f_i)``, shape ``(n,)``, of collected examples; :meth:`weighted` may follow."""
        assert self.collected is not None
        return self._norms(MicroBatches(self.n, 1), self.collected)

    def _norms(self, parts: MicroBatches, gradients: Gradients) -> Tensor:
        matrices, small = gradients
        with torch.no_grad():
            squares = squared_norms(matrices.values(), small.values())
            return self.to_own_mean(parts, squares) * squares.clamp_min(0).sqrt()

    def to_own_mean(self, parts: MicroBatches, like: Tensor) -> Tensor:
        """Return what turns contributions into gradients of each micro-batch's mean loss, shape ``(k,)``."""
        return self.n / self.loss_scale / parts.sizes(like)

    def weighted(self, p: Tensor) -> Vector:
        """Return ``sum_i p_i grad f_i`` on the perturbed parameters, after :meth:`by_example`, without a pass."""
        assert self.collected is not None
        (matrices, small), self.collected = self.collected, None
        made: list[Tensor | None] = [None] * len(self.parameters)
        with torch.no_grad():
            c = self.n * p
            for i, gradient in matrices.items():
                made[i] = gradient.weighted(c).reshape(self.parameters[i].shape)
                if isinstance(gradient, Factors) and gradient.bias is not None:
                    made[gradient.bias] = gradient.weighted_bias(c)
            for i, t in small.items():
                made[i] = (c.to(t.dtype) @ t.flatten(1)).reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def mean(self) -> Vector:
        """Return the gradient of the mean loss on the perturbed parameters, without a backward pass."""
        matrices, small = self.of(MicroBatches(self.n, self.n), HELD)
        made: list[Tensor | None] = [None] * len(self.parameters)
        for i, gradient in matrices.items():
            assert isinstance(gradient, Whole)
            made[i] = gradient.chunks[0][0].reshape(self.parameters[i].shape).clone()  # its memory serves the next
        for i, t in small.items():
            made[i] = t[0].reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def scale(self, c: Tensor) -> None:
        """Multiply the loss of every example, and so its gradients, by ``c_i``."""
        for site in self.first.sites:
            delta = site.deltas[0]
            rows = delta.shape[: len(site.leading)].numel()
            assert site.layout is not None
            c_rows = c[site.layout.example_of_row(rows, c.device)].to(delta.dtype)
            site.deltas[0] = delta * c_rows.reshape(*site.leading, *[1] * (delta.dim() - len(site.leading)))


def relative_cost(first: FirstPass) -> float:
    """Return the multiplications of a step with one micro-batch, relative to two forwards and backwards.

    Factors save a weight gradient and pay for Gram matrices. Gradients that are held whole save nothing.
    """
    parts = MicroBatches(first.tracked.n, first.tracked.n)
    matrices: Matrices = {}
    small: Small = {}
    usual = shared = 0.0
    with torch.no_grad():
        for site in first.sites:
            site.layer.collect(site, matrices, small)
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
