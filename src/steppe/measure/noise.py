"""Gradient noise: how per-example gradients differ."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine.vector import Vector
from steppe.factored import gradient_statistics
from steppe.measure.problem import Problem

log = logging.getLogger("steppe")
MIXED = "the gradients of single examples are not defined, because examples influence one another: "


@dataclass(frozen=True)
class GradientNoise:
    """The spread of the per-example gradients ``g_i`` of ``n`` examples around their mean ``g``.

    ``norms`` has ``norm(g_i)`` of every example, shape ``(n,)``, in the order of the data; ``g_norm`` is ``norm(g)``,
    ``trace`` is ``tr V = 1/n sum_i norm(g_i)^2 - norm(g)^2``; times ``n / (n - 1)`` it is unbiased. ``scale`` is
    ``tr V / norm(g)^2``, the simple noise scale in examples (McCandlish et al. 2018, arXiv 1812.06162): the batch size
    at which noise and signal are equal. It diverges at a minimum of the measured loss.
    """

    norms: Tensor
    g_norm: float
    trace: float
    scale: float


def gradient_noise(problem: Problem) -> GradientNoise:
    """Return per-example gradient norms and tr V.

    The norms come from activations and output gradients where the model allows it
    (:func:`steppe.factored.gradient_statistics`), else from a loop over the examples.

    Args:
        problem: model, loss and data.

    Raises:
        ValueError: examples influence one another (batch normalisation in training mode), so that the gradient of one
            is not defined.

    Example:
        >>> noise = gradient_noise(Problem(model, criterion, loader))
        >>> noise.trace, noise.norms.quantile(0.9)
    """
    with problem.untouched():
        for module in problem.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(f"{MIXED}{type(module).__name__} is in training mode")
        norms = torch.cat([_norms(problem, batch).cpu() for batch in problem.batches()]).double()
    g = float(problem.gradient().norm())
    trace = float(norms.square().mean()) - g**2
    return GradientNoise(norms, g, trace, trace / g**2 if g else float("inf"))


def _norms(problem: Problem, batch: Batch) -> Tensor:
    try:
        return gradient_statistics(batch, problem.parameters).norms
    except ValueError as error:
        log.debug("per-example gradients in a loop: %s", error)
    squares, total = list[Tensor](), Vector([None] * len(problem.parameters))
    for example in batch.split(1):
        g = problem.gradient_on(example)
        squares.append(g.norm().square())
        total = total + g
    norms = torch.stack(squares).sqrt()
    if float((total - problem.gradient_on(batch)).norm()) > 1e-3 * float(norms.sum()):
        raise ValueError(f"{MIXED}their gradients alone do not add up to the batch's")
    return norms
