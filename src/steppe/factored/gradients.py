"""From recorded sites to every micro-batch's gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steppe.factored.convolved import Convolved, settle
from steppe.factored.cost import Cost
from steppe.factored.held import Held
from steppe.factored.lookups import Coalesced, Lookup
from steppe.factored.parts import Parts
from steppe.factored.tape import CannotFactor, Look, Matrices, Small
from steppe.factored.terms import Dense, Factored, Gradient

Gradients = tuple[Mapping[int, Gradient], Mapping[int, Tensor]]


def gradients(look: Look, parts: Parts, cost: Cost, rho: Sequence[float] | None = None) -> Gradients:
    """Every micro-batch's gradient of every perturbed parameter: matrices as factors, the rest ``(k, *shape)``.

    The losses' mean over the batch was differentiated: these are its parts, ``n / m`` times too small as means over
    ``m``.

    Args:
        look: the recorded pass.
        parts: the micro-batches.
        cost: which matrices to hold whole.
        rho: by parameter; a bias rides along with the factors of its weight where both have the same.
    """
    chosen, by_example = choose(look, parts, cost)
    uses = Counter(i for site in look.sites for i in (site.weight, site.bias))
    matrices: dict[int, Gradient] = {}
    for i, (terms, whole) in chosen.items():
        biases = [t.bias for t in terms if isinstance(t, Dense) and t.bias is not None]
        if whole or len(terms) > 1 or any(uses[b] > 1 or (rho is not None and rho[b] != rho[i]) for b in biases):
            terms = [_alone(t, by_example) for t in terms]
        if whole:
            matrices[i] = Held(terms, parts, look.pool)
        else:
            only_lookups = all(isinstance(t, Lookup) for t in terms)
            matrices[i] = Coalesced(terms, parts) if only_lookups else Factored(_multipliable(terms), parts)
    for i in by_example.keys() & chosen.keys():
        raise CannotFactor(f"{look.tracked.names[i]} is used both as a matrix and directly")
    return matrices, _by_part(by_example, parts)


def choose(look: Look, parts: Parts, cost: Cost) -> tuple[dict[int, tuple[list[Any], bool]], Small]:
    """By matrix its terms and whether to hold it whole; by other parameter its uses, by example."""
    terms: Matrices = {}
    by_example: Small = {}
    for site in look.sites:
        site.operation.collect(site, terms, by_example)
    settled = {i: [settle(t, parts, cost) if isinstance(t, Convolved) else t for t in ts] for i, ts in terms.items()}
    return {i: (ts, _whole(ts, parts, cost)) for i, ts in settled.items()}, by_example


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


def _whole(terms: Sequence[Any], parts: Parts, cost: Cost) -> bool:
    """Hold ``G_k`` where a convolution needs it or it is cheaper."""
    if any(isinstance(t, Convolved) for t in terms):
        return True
    rows = min(parts.m, parts.n) * sum(t.right.shape[1] for t in terms)
    dense = [t for t in terms if isinstance(t, Dense)]
    if not dense:
        return cost.table(rows, terms[0].height)
    return cost.whole(rows, *dense[0].size)
