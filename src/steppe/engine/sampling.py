"""Random micro-batches of a step's batch: for m-SAM in expectation, and for a perturbation from a part of the batch."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, distributed

from steppe.batch import Batch, Batches, chunks_of
from steppe.engine.ddp import distributed_run
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.passes import PARTS
from steppe.engine.replay import RandomState, generator
from steppe.engine.update import Update
from steppe.engine.vector import TINY, Vector

Draw = tuple[Batch, Tensor]  # one of the accumulated batches, and the indices of examples in it


def sampled_average(f: Oracle, rule: AnyRule, m: int, k: int, seed: int, clip: float | None) -> Update:
    """Return ``g + (1 / k) sum_j [u(S_j) - g(S_j)]`` with ``S_1 ... S_k`` disjoint random micro-batches of the batch.

    ``g`` is the gradient of the whole batch, ``u(S)`` the rule's update and ``g(S)`` the gradient on ``S``. Its mean
    over the draws is the mean of the rule's updates over random micro-batches (m-SAM), where ``m`` divides the batch;
    with every micro-batch of a partition it is that mean exactly. What moves beside the base, and what is remembered,
    is averaged over the draws.

    Costs ``1 + k m / n`` passes where ``g`` may be made of the gradients on ``S_j`` and on the other examples: where
    the ``S_j`` are whole accumulated batches, and where nothing mixes examples (:mod:`steppe.factored` verifies that).
    Else it costs ``1 + 2 k m / n``.

    Both passes over ``S`` draw the same random numbers, and the stream goes on as after the passes of ``g``, which
    alone update running statistics.

    Of a :class:`~steppe.MeanBatch` only micro-batches that weigh something are drawn, ``k`` of the ``K`` of a
    partition, and the correction is ``(K / k) sum_j w_j / w [u(S_j) - g(S_j)]``.

    Args:
        f, rule: the step's oracle, and the rule of every micro-batch.
        m, k: examples in a micro-batch, and how many micro-batches are drawn.
        seed: of the draws.
        clip: the largest norm of the correction, in units of ``norm(g)``; ``None`` is any.
    """
    f.passes.ranks.stay_within()
    size, log = len(f.batch(PARTS)), f.passes.log
    draws, n = _draws(f, m, k, seed)
    parts, total = _parts_of_g(f, draws), sum(len(on) for _, on in draws)
    weight = sum(share for _, share in parts)
    stream = RandomState.now(f.passes.parameters.devices)
    corrections = []
    try:
        for part, share in parts:
            d = part.g  # held here: a rule that does not need it after its move lets go of it
            corrections.append(share * n / total * (part.update(rule) + Update(d * -1.0)))
            log.add_sample(share / weight, len(part.batch()) / size, part.passes.log)
    finally:
        stream.restore()
    return Update(f.g) + _clipped(f, reduce(add, corrections), clip)


def _draws(f: Oracle, m: int, k: int, seed: int) -> tuple[list[Draw], int]:
    """Return this step's draws, and how many examples are in the micro-batches that they are drawn from.

    Those are the micro-batches of a partition that weigh something.
    """
    batch, how = f.batch(PARTS), (seed, f.step, rank_of(f))
    if batch.per_example:
        return drawn(batch, m, k, *how), len(batch)
    every = drawn(batch, m, len(batch), *how)
    weighed = f.passes.weighed([batch_of(draw) for draw in every])
    draws = [draw for draw, (_, share) in zip(every, weighed, strict=True) if share]
    return draws[:k], sum(len(on) for _, on in draws)


def _parts_of_g(f: Oracle, draws: Sequence[Draw]) -> list[tuple[Oracle, float]]:
    """Set ``f.g``, and return the draws' oracles and shares; with their gradients, where ``g`` is made of these."""
    apart = f.passes.parameters.sharded and not f.batch().per_example  # the draws' losses are weighed for all ranks
    if f.knows_g or apart or not (all(len(on) == len(chunk) for chunk, on in draws) or f.adds()):
        f.g = f.g  # takes its pass
        return [(f.part(batch), share) for batch, share in f.passes.weighed([batch_of(draw) for draw in draws])]
    log, whole, seen, parts = f.passes.log, f.batch().weight, 0.0, []
    g = Vector([None] * len(f.w.tensors))
    for batch, chosen in _cut(f.batch(), draws):
        part, share = f.part(batch), batch.weight / whole
        if not share:
            continue
        seen += share
        g = g.lerp(part.g, share / seen)
        if chosen:
            parts.append((part, share))
            log.count("loss", share * part.passes.log.numbers["loss"])
        else:
            log.add(share, part.passes.log)
    f.g = g
    f.passes.counted, log.numbers["g_norm"] = True, g.norm()
    return parts


def _cut(batch: Batch, draws: Sequence[Draw]) -> list[tuple[Batch, bool]]:
    """Return batches that make up the whole in the order of its passes, and whether each is a draw."""
    cut: list[tuple[Batch, bool]] = []
    for chunk in chunks_of(batch):
        here = [draw for draw in draws if draw[0] is chunk]
        cut += [(batch_of(draw), True) for draw in here]
        if sum(len(on) for _, on in here) == len(chunk):
            continue
        other = chunk.subset(_others(len(chunk), here)) if here else chunk
        if cut and not cut[-1][1]:
            cut[-1] = Batches([cut[-1][0], other]), False
        else:
            cut.append((other, False))
    return cut


def _others(n: int, draws: Sequence[Draw]) -> Tensor:
    """Return the indices of the ``n`` examples that are in none of the draws."""
    left = torch.ones(n, dtype=torch.bool)
    for _, on in draws:
        left[on] = False
    return left.nonzero().flatten()


def _clipped(f: Oracle, correction: Update, clip: float | None) -> Update:
    """Return the correction with at most ``clip`` times the norm of ``g``, and log how large it is."""
    norm = correction.grad.norm()
    if correction.beside is not None:
        norm = (norm.square() + correction.beside.norm().square()).sqrt()
    ratio = norm / (f.g.norm() + TINY)
    kept = ratio if clip is None else ratio.clamp(max=clip)
    f.passes.log.numbers["correction"] = kept
    return correction if clip is None else kept / (ratio + TINY) * correction


def gradient_of_subset(f: Oracle, sample: Callable[[Oracle], Vector], m: int, seed: int) -> Vector:
    """Return ``sample`` on ``m`` random examples of the batch, in ``m / n`` of its passes.

    The random stream is put back, so the passes over the whole batch draw the numbers of the base optimizer's own step.
    Running statistics do not see the subset. They see the whole batch: at ``w`` where the method takes its gradient
    there too, else at ``w + eps``.
    """
    batch = f.batch(PARTS)
    if f._declares.g:  # not for the cosine alone, which must change no step
        f.g = f.g  # now, so that running statistics see this pass
    draws = (draw for k in (1, len(batch)) for draw in drawn(batch, m, k, seed, f.step, rank_of(f)))
    chosen = next(part for part in map(batch_of, draws) if part.weight)  # a mean over tokens may have none of them
    stream = RandomState.now(f.passes.parameters.devices)
    part = f.part(chosen)
    part.passes.counted = True
    try:
        d = sample(part)
    finally:
        stream.restore()
    f.passes.log.add_other(part.passes.log, len(part.batch()) / len(batch))
    return d


def drawn(batch: Batch, m: int, draws: int, seed: int, step: int, rank: int = 0) -> list[Draw]:
    """Return ``draws`` disjoint micro-batches of ``m`` random examples; at most those of one partition.

    They do not cross accumulated batches, and smaller ones, of what a batch has left over, come last. The choice
    depends on the seed, the step and the rank alone, so a resume repeats it.
    """
    random = generator(seed * 1_000_003 + rank, step)
    chunks = chunks_of(batch)
    parts = [(chunk, i) for chunk in chunks for i in torch.randperm(len(chunk), generator=random).split(m)]
    mixed = [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]
    mixed.sort(key=lambda part: len(part[1]) < m)
    return mixed[:draws]


def batch_of(draw: Draw) -> Batch:
    """Return the batch of the drawn examples."""
    chunk, on = draw
    return chunk if len(on) == len(chunk) else chunk.subset(on)


def rank_of(f: Oracle) -> int:
    """Return the rank that the draws depend on.

    With sharded parameters it is 0 everywhere: ranks that split a layer between them hold the same examples and must
    draw the same, and ranks with other examples draw other ones by the same indices.
    """
    return distributed.get_rank() if distributed_run() and not f.passes.parameters.sharded else 0
