"""Gradient noise: how per-example gradients differ."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from steppe.batch import Batch, Data, mapped
from steppe.engine.functional import functional
from steppe.engine.vector import Vector
from steppe.factored import gradient_statistics
from steppe.measure.problem import Problem

log = logging.getLogger("steppe")
HELD = 2**26  # numbers in the per-example gradients that vmap holds at once: 256 MB in float32
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
    (:func:`steppe.factored.gradient_statistics`), else from ``vmap``, else from a loop over the examples.

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
        log.debug("per-example gradients by vmap: %s", error)
    try:
        squares, total = _under_vmap(problem, batch)
    except RuntimeError as error:  # an operation that vmap does not support, or a branch on data
        log.debug("per-example gradients in a loop: %s", error)
        squares, total = _one_by_one(problem, batch)
    g = torch.autograd.grad(batch.losses().sum(), problem.parameters, allow_unused=True)
    if float((total - Vector(g)).norm()) > 1e-3 * float(squares.sqrt().sum()):
        raise ValueError(f"{MIXED}their gradients alone do not add up to the batch's")
    return squares.sqrt()


def _under_vmap(problem: Problem, batch: Batch) -> tuple[Tensor, Vector]:
    """Return the squared norms of the per-example gradients, and the gradients' sum."""
    names = {id(p): name for name, p in batch.model.named_parameters()}
    losses, w = functional(batch.model, batch.loss), {names[id(p)]: p.detach() for p in problem.parameters}

    def f(w: dict[str, Tensor], example: Data) -> Tensor:
        return losses(w, mapped(lambda t: t.unsqueeze(0), example)).sum()

    squares, total = [], Vector([None] * len(w))
    for part in batch.split(max(1, HELD // sum(p.numel() for p in w.values()))):
        G: dict[str, Tensor] = vmap(grad(f), in_dims=(None, 0))(w, part.data)
        squares.append(torch.stack([t.flatten(1).square().sum(1) for t in G.values()]).sum(0))
        total = total + Vector([t.sum(0) for t in G.values()])
    return torch.cat(squares), total


def _one_by_one(problem: Problem, batch: Batch) -> tuple[Tensor, Vector]:
    squares, total = [], Vector([None] * len(problem.parameters))
    for example in batch.split(1):
        g = Vector(torch.autograd.grad(example.losses().sum(), problem.parameters, allow_unused=True))
        squares.append(g.norm().square())
        total = total + g
    return torch.stack(squares), total
