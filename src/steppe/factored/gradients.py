"""From recorded sites to every micro-batch's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from steppe.factored.conv import Convolved, settle
from steppe.factored.parts import Parts
from steppe.factored.tape import CannotFactor, Look, Matrices, Small
from steppe.factored.terms import Gradient, Lookup, cheaper_whole


def gradients(
    look: Look, parts: Parts, whole: bool | None = None, products: int = 3
) -> tuple[Mapping[int, Gradient], Mapping[int, Tensor]]:
    """Every micro-batch's gradient of every perturbed parameter: matrices as factors, the rest ``(k, *shape)``.

    The losses' mean over the batch was differentiated: these are its parts, ``n / m`` times too small as means over
    ``m``.

    Args:
        look: the recorded pass.
        parts: the micro-batches.
        whole: hold every matrix, or none; ``None`` asks the cost rule.
        products: for the cost rule, how many products with factors are to come; 1 where only norms are asked for.
    """
    terms: Matrices = {}
    by_example: Small = {}
    for site in look.sites:
        site.operation.collect(site, terms, by_example)
    small = {i: parts.sums(sum(ts[1:], ts[0])) for i, ts in by_example.items() if i not in terms}
    matrices = {}
    for i, ts in terms.items():
        ts = [settle(t, parts, products) if isinstance(t, Convolved) and whole is None else t for t in ts]
        for extra in by_example.get(i, ()):
            raise CannotFactor(f"{look.tracked.names[i]} is used both as a matrix and directly ({tuple(extra.shape)})")
        matrices[i] = Gradient(ts, parts, _whole(ts, parts, products) if whole is None else whole)
    return matrices, small


def _whole(terms: Iterable[Any], parts: Parts, products: int) -> bool:
    """Hold ``G_k`` where a convolution needs it or it is cheaper; never only for lookups."""
    terms = list(terms)
    if any(isinstance(t, Convolved) for t in terms):
        return True
    dense = [t for t in terms if not isinstance(t, Lookup)]
    rows = min(parts.m, parts.n) * sum(t.right.shape[1] for t in terms)
    return bool(dense) and cheaper_whole(rows, dense[0].left.shape[-1], dense[0].right.shape[-1], products)
