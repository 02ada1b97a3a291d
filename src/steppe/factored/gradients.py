"""From recorded sites to every micro-batch's gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steppe.factored.convolved import Convolved
from steppe.factored.cost import Cost
from steppe.factored.held import Held
from steppe.factored.lookups import Coalesced, Lookup
from steppe.factored.parts import Parts
from steppe.factored.tape import CannotFactor, Look, Matrices, Site, Small
from steppe.factored.terms import Dense, Factored, Gradient

Gradients = tuple[Mapping[int, Gradient], Mapping[int, Tensor]]


class Harvest:
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

    def __init__(self, look: Look, parts: Parts, cost: Cost, rho: Sequence[float] | None = None) -> None:
        self.look, self.parts, self.cost, self.rho = look, parts, cost, rho
        self.terms: Matrices = {}
        self.by_example: Small = {}
        self.matrices: dict[int, Gradient] = {}

    @cached_property
    def uses(self) -> Counter[int | None]:
        """How often each parameter is used."""
        return Counter(i for site in self.look.sites for i in (site.weight, site.bias))

    def take(self, site: Site) -> None:
        """What one use contributes."""
        site.operation.collect(site, self.terms, self.by_example)
        if site.weight is not None and len(self.terms.get(site.weight, ())) == self.uses[site.weight]:
            self.matrices[site.weight] = self.made(site.weight, self.terms.pop(site.weight))

    def made(self, i: int, terms: Sequence[Any]) -> Gradient:
        """The gradients of one matrix, whole or as factors."""
        terms, whole = choose(terms, self.parts, self.cost)
        biases = [t.bias for t in terms if isinstance(t, Dense) and t.bias is not None]
        unlike = any(self.uses[b] > 1 or (self.rho and self.rho[b] != self.rho[i]) for b in biases)
        if whole or len(terms) > 1 or unlike:
            terms = [_alone(t, self.by_example) for t in terms]
        if whole:
            return Held(terms, self.parts, self.look.pool)
        if all(isinstance(t, Lookup) for t in terms):
            return Coalesced(terms, self.parts)
        return Factored(_multipliable(terms), self.parts)

    def gradients(self) -> Gradients:
        """Of every perturbed parameter: matrices whole or as factors, the rest ``(k, *shape)``."""
        for i in self.by_example.keys() & (self.matrices.keys() | self.terms.keys()):
            raise CannotFactor(f"{self.look.tracked.names[i]} is used both as a matrix and directly")
        return self.matrices, _by_part(self.by_example, self.parts)


def gradients(look: Look, parts: Parts, cost: Cost, rho: Sequence[float] | None = None) -> Gradients:
    """What a :class:`Harvest` gathers after the pass."""
    harvest = Harvest(look, parts, cost, rho)
    for site in look.sites:
        harvest.take(site)
    return harvest.gradients()


def choose(terms: Sequence[Any], parts: Parts, cost: Cost) -> tuple[Sequence[Any], bool]:
    """A matrix's terms, and whether to hold it whole."""
    if any(isinstance(t, Convolved) for t in terms):
        if not all(isinstance(t, Convolved) for t in terms):
            raise CannotFactor("the weight of a convolution is used by something else, too")
        by_patches = all(t.suits_patches(parts, cost) for t in terms)  # one order of columns for all
        return ([t.dense() for t in terms], False) if by_patches else (terms, True)
    rows = min(parts.m, parts.n) * sum(t.right.shape[1] for t in terms)
    dense = [t for t in terms if isinstance(t, Dense)]
    return terms, cost.whole(rows, *dense[0].size) if dense else cost.table(rows, terms[0].height)


def _multipliable(terms: Sequence[Any]) -> Sequence[Any]:
    """Factors whose products with each other are numbers: of one type, and not of float16, which ends at 65504."""
    types = {t.right.dtype for t in terms}
    return [t.to(torch.float32) for t in terms] if len(types) > 1 or torch.float16 in types else terms


def _alone(term: Any, by_example: Small) -> Any:
    """A term without the bias that would ride along, which is summed by itself."""
    if not isinstance(term, Dense) or term.bias is None:
        return term
    by_example.setdefault(term.bias, []).append(term.left.sum(1))
    return replace(term, bias=None)


def _by_part(by_example: Small, parts: Parts) -> dict[int, Tensor]:
    """Sums over uses and over the examples of every part, in one call for all parameters of a type."""
    total = {i: sum(ts[1:], ts[0]) for i, ts in by_example.items()}
    if len({(t.dtype, t.device) for t in total.values()}) > 1:
        return {i: parts.sums(t) for i, t in total.items()}
    if not total:
        return {}
    sums = parts.sums(torch.cat([t.flatten(1) for t in total.values()], 1))
    split = sums.split([t[0].numel() for t in total.values()], 1)
    return {i: s.unflatten(1, t.shape[1:]) for (i, t), s in zip(total.items(), split, strict=True)}
