"""Gradient noise from one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from steppe import check
from steppe.batch import Batch
from steppe.factored.parts import Parts
from steppe.factored.plan import plan_for
from steppe.factored.record import factors_of
from steppe.oracle import Oracle
from steppe.point import Point, Rho
from steppe.replay import RandomState


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
    random stream are left as they were.

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
    check.positive_integer("m", m)
    parameters = list(batch.model.parameters() if params is None else params)
    f = Oracle(batch, Point(parameters, Rho([1.0] * len(parameters))), parallel=True)
    before = RandomState.now(f.point.devices)
    kept = [p.grad for p in parameters]
    if plan_for(f, batch).mixes:
        raise ValueError("the gradients of single examples are not defined: batch normalisation mixes them")
    with f.away():  # statistics are not to count this batch
        factors = factors_of(f)
    before.restore()
    for p, g in zip(parameters, kept, strict=True):
        p.grad = g
    assert factors is not None
    parts, whole = Parts(len(batch), m), Parts(len(batch), len(batch))
    norms, g_norm = factors.norms(parts), factors.norms(whole)[0]
    trace = (parts.sizes(norms) / len(batch)) @ norms.square() - g_norm.square()
    return GradientStatistics(norms, g_norm, trace, g_norm.square() / trace)
