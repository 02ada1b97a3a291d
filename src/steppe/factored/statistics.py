"""Gradient statistics: per-example gradient norms and tr V from one pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.batch import Batch, chunks_of
from steppe.engine import checks
from steppe.engine.ddp import RankGroups
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.replay import RandomState
from steppe.factored.engine import SharedPasses
from steppe.factored.microbatches import MicroBatches


@dataclass(frozen=True)
class GradientStatistics:
    """The norms of per-example (or micro-batch) gradients, and their variance.

    Attributes:
        norms: ``norm(G_k)`` of every example or micro-batch, shape ``(k,)``.
        g_norm: ``norm(g)``, of the mean gradient.
        trace: ``tr V = sum_k share_k norm(G_k)^2 - norm(g)^2``, the trace of their covariance in this batch
            (population; times ``k / (k - 1)`` it is unbiased for equal parts drawn independently).
        signal_to_noise: ``norm(g)^2 / tr V``.
    """

    norms: Tensor
    g_norm: Tensor
    trace: Tensor
    signal_to_noise: Tensor


def gradient_statistics(batch: Batch, params: Iterable[Tensor] | None = None, m: int = 1) -> GradientStatistics:
    """Return the norms of per-example (or micro-batch) gradients and tr V, from one forward and backward pass.

    No gradient is formed where its factors are cheaper. Weights, gradients, running statistics and the random stream
    are restored. Micro-batches do not cross accumulated batches (:class:`~steppe.Batches`); the factors of one batch
    are held at a time, beside the mean gradient. Numbers are those of the unscaled loss. Where a scaled loss
    (``scaler``) overflows, they are not finite, and the scaler is not told.

    Args:
        batch: the examples.
        params: the parameters to differentiate by; ``None`` means all parameters of the model that require a gradient.
        m: the number of examples in a micro-batch.

    Raises:
        TypeError: the batch is a :class:`~steppe.MeanBatch`.
        ValueError: ``m`` is not a positive integer, or the gradients of the model do not factor; the message says why.

    Example:
        >>> noise = gradient_statistics(Batch.supervised(model, criterion, inputs, targets))
        >>> noise.trace, noise.signal_to_noise
    """
    checks.positive_integer("m", m)
    batch.require_losses("gradient statistics")
    parameters = list(batch.model.parameters() if params is None else params)
    ranks = RankGroups("auto").of_step(batch.modules, parameters)  # each rank's own examples
    f = Oracle(batch, Parameters(parameters, Radii([1.0] * len(parameters))), ranks=ranks)
    engine = SharedPasses(parallel=True)
    before = RandomState.now(f.passes.parameters.devices)
    kept = [p.grad for p in parameters]
    try:
        with ranks.apart(), f.passes.away_from_w():  # running statistics do not count this batch
            norms, sizes, g_norm = _norms(f, engine, chunks_of(batch), m)
    finally:
        before.restore()
        for p, g in zip(parameters, kept, strict=True):
            p.grad = g
    trace = (sizes / len(batch)) @ norms.square() - g_norm.square()
    return GradientStatistics(norms, g_norm, trace, g_norm.square() / trace)


def _norms(f: Oracle, engine: SharedPasses, chunks: Sequence[Batch], m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm and size of every micro-batch, and the norm of the mean gradient."""
    norms, sizes, mean = [], [], None
    for share, part in f.parts(chunks):
        recorded = engine.recorded(part, needs_g=len(chunks) > 1)
        parts = MicroBatches(recorded.n, m)
        norms.append(recorded.norms(parts))
        sizes.append(parts.sizes(norms[-1]))
        if len(chunks) == 1:  # no gradient need be formed
            return norms[0], sizes[0], recorded.norms(MicroBatches(recorded.n, recorded.n))[0]
        g = share * recorded.g / recorded.loss_scale
        mean = g if mean is None else mean + g
    assert mean is not None
    return torch.cat(norms), torch.cat(sizes), mean.norm()
