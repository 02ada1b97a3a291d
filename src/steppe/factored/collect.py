"""Makes the gradients of every micro-batch from the sites of the first pass, whole or as factors, as is cheaper."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from steppe.engine.vector import Vector
from steppe.factored.gradients import Factors, Gradient, Rows, Whole, squared_norms
from steppe.factored.maps import Conv, Lookup, Use
from steppe.factored.microbatches import MicroBatches
from steppe.factored.passes import FirstPass
from steppe.factored.sites import CannotFactor, Matrices, Site, Small


@dataclass(frozen=True)
class Cost:
    """The work that follows with ``G_k``, which decides whether to hold it whole.

    Multiplications are counted for one micro-batch, with ``rows`` rows of factors and a matrix of ``height x width``.

    Attributes:
        products: how many products with factors follow, of ``rows^2 (height + width)`` each: Gram matrices, the
            perturbed forward and its backward.
        weighted: whether a weighted sum follows, which costs factors another ``rows height width``.
        memory: the cost of reading and writing one number of ``G_k``, in multiplications.
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


TWO_PASSES, NORMS, WEIGHTED = Cost(3, memory=50), Cost(1), Cost(1, weighted=True)


Gradients = tuple[Mapping[int, Gradient], Mapping[int, Tensor]]


class Collector:
    """The gradients of every micro-batch, collected from the sites of the first pass.

    Those of a parameter are made when backward has reached all its uses, or after the pass. So their factors are freed
    before the next layer needs memory. They are contributions to the gradient of the batch's mean loss: ``m / n`` times
    the gradient of a micro-batch's own mean.

    Args:
        first: the recorded pass. Its forward has ended when the first site is taken.
        parts: the micro-batches.
        cost: what decides which matrices are held whole.
        rho: the radius of every parameter; a bias is kept with the factors of its weight where both are equal.
    """

    def __init__(self, first: FirstPass, parts: MicroBatches, cost: Cost, rho: Sequence[float] | None = None) -> None:
        self.first, self.parts, self.cost, self.rho = first, parts, cost, rho
        self.uses: Matrices = {}
        self.by_example: Small = {}
        self.by_part: Small = {}
        self.matrices: dict[int, Gradient] = {}

    @cached_property
    def counts(self) -> Counter[int | None]:
        """The number of uses of each parameter."""
        return Counter(i for site in self.first.sites for i in (site.weight, site.bias))

    def take(self, site: Site) -> None:
        """Add the contribution of one use."""
        of_parts = site.parts is not None and site.parts.m > 1
        site.layer.collect(site, self.uses, self.by_part if of_parts else self.by_example)
        if site.weight is not None and len(self.uses.get(site.weight, ())) == self.counts[site.weight]:
            self.matrices[site.weight] = self._made(site.weight, self.uses.pop(site.weight))

    def _made(self, i: int, uses: Sequence[Use]) -> Gradient:
        """Return the gradients of one matrix, whole or as factors."""
        whole = hold_whole(uses, self.parts, self.cost)
        b = uses[0].bias
        equal = b is None or (self.counts[b] == 1 and (not self.rho or self.rho[b] == self.rho[i]))
        if whole or len(uses) > 1 or not equal:
            for use in uses:
                if use.bias is not None:
                    delta = use.delta[:, 0] if use.delta.shape[1] == 1 else use.delta.sum(1)
                    self.by_example.setdefault(use.bias, []).append(delta)
            b = None
        if whole:
            return Whole(uses, self.parts)
        if all(isinstance(use.map, Lookup) for use in uses):
            return Rows(uses, self.parts)
        return Factors(uses, self.parts, b)

    def gradients(self) -> Gradients:
        """Return the gradients of all matrices, whole or as factors, and of other parameters, ``(k, *shape)``."""
        for i in (self.by_example.keys() | self.by_part.keys()) & (self.matrices.keys() | self.uses.keys()):
            raise CannotFactor(f"{self.first.tracked.names[i]} is used both as a matrix and directly")
        small = {i: self.parts.sums(reduce(torch.add, ts)) for i, ts in self.by_example.items()}
        for i, copies in self.by_part.items():
            small[i] = reduce(torch.add, [*copies, small[i]] if i in small else copies)
        return self.matrices, small


def hold_whole(uses: Sequence[Use], parts: MicroBatches, cost: Cost) -> bool:
    """Return whether to hold the gradients of a matrix whole."""
    m = min(parts.m, parts.n)
    shapes = [use.shape for use in uses]
    convs = [use.map for use in uses if isinstance(use.map, Conv)]
    if convs and len(convs) < len(uses):
        raise CannotFactor("the weight of a convolution is used by something else, too")
    if convs:  # patches cost as much again, and need a single group
        return any(map.groups > 1 or cost.whole(2 * m * q, h, w) for map, (q, h, w) in zip(convs, shapes, strict=True))
    rows, (_, height, width) = m * sum(q for q, *_ in shapes), shapes[0]
    only_looked_up = all(isinstance(use.map, Lookup) for use in uses)
    return cost.table(rows, height) if only_looked_up else cost.whole(rows, height, width)


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
        collector = Collector(self.first, parts, cost, rho)
        with torch.no_grad():
            for site in self.first.sites:
                collector.take(site)
            return collector.gradients()

    def norms(self, parts: MicroBatches) -> Tensor:
        """Return ``norm(G_k)`` over all perturbed parameters together, shape ``(k,)``."""
        matrices, small = self.collected or self.of(parts, NORMS)
        with torch.no_grad():
            squares = squared_norms(matrices.values(), small.values())
            return self.to_own_mean(parts, squares) * squares.clamp_min(0).sqrt()

    def to_own_mean(self, parts: MicroBatches, like: Tensor) -> Tensor:
        """Return what turns contributions into gradients of each micro-batch's mean loss, shape ``(k,)``."""
        return self.n / self.loss_scale / parts.sizes(like)

    def weighted(self, p: Tensor) -> Vector:
        """Return ``sum_i p_i grad f_i`` on the perturbed parameters, if they were collected by example."""
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
                made[i] = (c.to(t.dtype) @ t.reshape(len(t), -1)).reshape(self.parameters[i].shape)
        return Vector(made) / self.loss_scale

    def scale(self, c: Tensor) -> None:
        """Multiply the loss of every example, and so its gradients, by ``c_i``."""
        for site in self.first.sites:
            delta = site.by_example(site.deltas[0])
            site.deltas[0] = site.by_row(delta * c.to(delta.dtype).reshape(-1, *[1] * (delta.dim() - 1)))


def relative_cost(first: FirstPass) -> float:
    """Return the multiplications of a step with one micro-batch, relative to two forwards and backwards.

    Factors save a weight gradient and pay for Gram matrices. Gradients that are held whole save nothing.
    """
    parts = MicroBatches(first.tracked.n, first.tracked.n)
    matrices: Matrices = {}
    usual = shared = 0.0
    with torch.no_grad():
        for site in first.sites:
            if site.map is not None:
                site.layer.collect(site, matrices, {})
    for uses in matrices.values():
        whole = hold_whole(uses, parts, TWO_PASSES)
        for use in uses:
            if isinstance(use.map, Lookup):
                continue
            q, height, width = use.shape
            rows = parts.n * q
            usual += 6.0 * rows * height * width
            gram = 5.0 * rows * height * width + 3.0 * rows * rows * (height + width)
            shared += 6.0 * rows * height * width if whole else gram
    return shared / usual if usual else 1.0
