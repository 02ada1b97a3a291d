"""Sampled m-SAM: the update of m-SAM in expectation, from a few random micro-batches."""

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
    batches = drawn(whole, m, draws, seed, f.step)
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


def drawn(batch: Batch, m: int, draws: int, seed: int, step: int) -> list[Batch]:
    """Return ``draws`` disjoint micro-batches of ``m`` random examples; at most those of one partition.

    They do not cross accumulated batches, and smaller ones, of what a batch has left over, come last. The choice
    depends on the seed, the step and the rank alone, so a resume repeats it.
    """
    rank = distributed.get_rank() if distributed_run() else 0
    random = generator(seed * 1_000_003 + rank, step)
    chunks = chunks_of(batch)
    parts = [(chunk, i) for chunk in chunks for i in torch.randperm(len(chunk), generator=random).split(m)]
    mixed = [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]
    mixed.sort(key=lambda part: len(part[1]) < m)
    return [chunk.subset(i) for chunk, i in mixed[:draws]]
