"""Gradient noise from one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steppe.batch import Batch, chunks_of
from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.replay import RandomState
from steppe.factored.engine import SharedPasses
from steppe.factored.parts import Parts
from steppe.factored.plan import Entry


@dataclass(frozen=True)
class GradientStatistics:
    """How the gradients of a batch's examples, or micro-batches, differ.

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
    """Norms of the gradients of every example (or micro-batch of ``m``), and tr V, from one forward and backward.

    No gradient is materialised where its factors are cheaper. Weights, gradients, normalisation statistics and the
    random stream are left as they were. Micro-batches do not cross accumulated batches (:class:`~steppe.Batches`), of
    which one is held at a time, beside their mean gradient. Numbers are those of the unscaled loss; where it is scaled
    (``scaler``) and a gradient overflows, they are not finite, and the scaler hears nothing of it.

    Args:
        batch: the examples.
        params: the parameters to differentiate by; ``None`` is every parameter of the model that requires a gradient.
        m: examples in a micro-batch.

    Raises:
        ValueError: ``m`` is no positive integer, or the model's gradients do not factor; the message says why.

    Example:
        >>> noise = gradient_statistics(Batch.supervised(model, criterion, inputs, targets))
        >>> noise.trace, noise.signal_to_noise
    """
    checks.positive_integer("m", m)
    parameters = list(batch.model.parameters() if params is None else params)
    f = Oracle(batch, Parameters(parameters, Radii([1.0] * len(parameters))))
    engine = SharedPasses(parallel=True)
    before = RandomState.now(f.passes.parameters.devices)
    kept = [p.grad for p in parameters]
    try:
        entries = [engine.entry(f, chunk) for chunk in chunks_of(batch)]
        if any(entry.plan.mixes for entry in entries):
            raise ValueError("the gradients of single examples are not defined: batch normalisation mixes them")
        with f.passes.moved():  # statistics are not to count this batch
            norms, sizes, g_norm = _norms(f, engine, entries, m)
    finally:
        before.restore()
        for p, g in zip(parameters, kept, strict=True):
            p.grad = g
    trace = (sizes / len(batch)) @ norms.square() - g_norm.square()
    return GradientStatistics(norms, g_norm, trace, g_norm.square() / trace)


def _norms(f: Oracle, engine: SharedPasses, entries: Sequence[Entry], m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and size of every micro-batch, and the norm of the mean gradient; one batch's factors at a time."""
    norms, sizes, mean = [], [], None
    for (share, part), entry in zip(f.parts(chunks_of(f.batch())), entries, strict=True):
        factors = engine.first_pass(part, entry=entry)
        assert factors is not None
        parts = Parts(factors.n, m)
        norms.append(factors.norms(parts))
        sizes.append(parts.sizes(norms[-1]))
        if len(entries) == 1:  # no gradient need be made
            return norms[0], sizes[0], factors.norms(Parts(factors.n, factors.n))[0]
        mean = share * factors.mean() if mean is None else mean + share * factors.mean()
    assert mean is not None
    return torch.cat(norms), torch.cat(sizes), mean.norm()
