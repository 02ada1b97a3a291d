"""Random micro-batches of a step's batch: for m-SAM in expectation, and for a perturbation from a part of the batch."""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import distributed

from steppe.batch import Batch, chunks_of
from steppe.engine.ddp import distributed_run
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.passes import PARTS
from steppe.engine.replay import RandomState, generator
from steppe.engine.update import Update
from steppe.engine.vector import Vector


def sampled_average(f: Oracle, rule: AnyRule, m: int, draws: int, seed: int) -> Update:
    """Return ``g + (1 / k) sum_j [u(S_j) - g(S_j)]`` with ``S_1 ... S_k`` disjoint random micro-batches of the batch.

    ``g`` is the gradient of the whole batch, ``u(S)`` the rule's update and ``g(S)`` the gradient on ``S``. Its mean
    over the draws is the mean of the rule's updates over random micro-batches (m-SAM), where ``m`` divides the batch;
    with every micro-batch of a partition it is that mean exactly. What moves beside the base, and what is remembered,
    is averaged over the draws. Costs ``1 + 2 k m / n`` passes.

    Both passes over ``S`` draw the same random numbers, and the stream goes on as after the pass of ``g``, which alone
    updates running statistics.
    """
    f.passes.ranks.stay_within()
    whole = f.batch(PARTS)
    g, log, n = f.g, f.passes.log, len(whole)
    batches = drawn(whole, m, draws, seed, f.step, rank_of(f))
    total = sum(map(len, batches))
    stream = RandomState.now(f.passes.parameters.devices)
    corrections = []
    try:
        for batch in batches:
            share = batch.weight / whole.weight * n / total
            if not share:  # a mean over none of the batch's tokens
                continue
            part = f.part(batch, keep_g=True)
            update = part.average(rule)
            corrections.append(share * (update + Update(part.g * -1.0)))
            log.add_sample(share, len(batch) / n, part.passes.log)
    finally:
        stream.restore()
    return reduce(add, corrections, Update(g))


def gradient_of_subset(f: Oracle, sample: Callable[[Oracle], Vector], m: int, seed: int) -> Vector:
    """Return ``sample`` on ``m`` random examples of the batch, in ``m / n`` of its passes.

    The random stream is put back, so the passes over the whole batch draw the numbers of the base optimizer's own step.
    Running statistics do not see the subset. They see the whole batch: at ``w`` where the method takes its gradient
    there too, else at ``w + eps``.
    """
    batch = f.batch(PARTS)
    if f.needs_g:
        f.g = f.g  # now, so that running statistics see this pass
    draws = (part for k in (1, len(batch)) for part in drawn(batch, m, k, seed, f.step, rank_of(f)))
    chosen = next(part for part in draws if part.weight)  # a mean over tokens may have none of them
    stream = RandomState.now(f.passes.parameters.devices)
    part = f.part(chosen)
    part.passes.counted = True
    try:
        d = sample(part)
    finally:
        stream.restore()
    f.passes.first_is_away = True
    f.passes.log.add_other(part.passes.log, len(chosen) / len(batch))
    return d


def drawn(batch: Batch, m: int, draws: int, seed: int, step: int, rank: int = 0) -> list[Batch]:
    """Return ``draws`` disjoint micro-batches of ``m`` random examples; at most those of one partition.

    They do not cross accumulated batches, and smaller ones, of what a batch has left over, come last. The choice
    depends on the seed, the step and the rank alone, so a resume repeats it.
    """
    random = generator(seed * 1_000_003 + rank, step)
    chunks = chunks_of(batch)
    parts = [(chunk, i) for chunk in chunks for i in torch.randperm(len(chunk), generator=random).split(m)]
    mixed = [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]
    mixed.sort(key=lambda part: len(part[1]) < m)
    return [chunk.subset(i) for chunk, i in mixed[:draws]]


def rank_of(f: Oracle) -> int:
    """Return the rank that the draws depend on.

    With sharded parameters it is 0 everywhere: ranks that split a layer between them hold the same examples and must
    draw the same, and ranks with other examples draw other ones by the same indices.
    """
    return distributed.get_rank() if distributed_run() and not f.passes.parameters.sharded else 0
