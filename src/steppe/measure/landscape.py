"""The loss on lines and planes through the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steppe.engine.vector import TINY, Vector, wide
from steppe.measure.krylov import gaussian
from steppe.measure.problem import Problem


@dataclass(frozen=True)
class Line:
    """``loss[i] = L(w + t[i] d)``."""

    t: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Plane:
    """``loss[j][i] = L(w + x[i] a + y[j] b)``."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]


def filter_normalised(problem: Problem, seed: int = 0) -> Vector:
    """Return a Gaussian direction whose filters have the norms of the model's: ``d_i <- d_i norm(w_i) / norm(d_i)``.

    Li et al. 2018 (arXiv 1712.09913, section 4). A filter is a row of the first dimension of a parameter with two or
    more dimensions. Biases and normalisation parameters do not move.

    Args:
        problem: model, loss and data.
        seed: of the Gaussian direction.
    """

    def scaled(d: Tensor, w: Tensor) -> Tensor:
        lengths = [torch.linalg.vector_norm(wide(t), dim=tuple(range(1, w.dim())), keepdim=True) for t in (w, d)]
        return torch.mul(d, lengths[0] / (lengths[1] + TINY))

    weights = Vector([p.detach() if p.dim() >= 2 else None for p in problem.parameters])
    return gaussian(problem.parameters, torch.Generator().manual_seed(seed)).map(scaled, weights)


def towards(problem: Problem, other: nn.Module | Mapping[str, Tensor]) -> Vector:
    """Return ``w' - w``: along it ``t = 0`` is the model and ``t = 1`` another one, a module or its ``state_dict``.

    Buffers stay the model's. Running statistics are wrong in between; ``mode="train"`` uses those of the batch.

    Args:
        problem: model, loss and data.
        other: a module of the same parameters, or its ``state_dict``.

    Raises:
        ValueError: the other model lacks a parameter, or has another shape.
    """
    state = dict(other.named_parameters()) if isinstance(other, nn.Module) else other
    names = {id(p): name for name, p in problem.model.named_parameters()}
    differences = []
    for name, p in ((names[id(p)], p) for p in problem.parameters):
        if name not in state or state[name].shape != p.shape:
            raise ValueError(f"other must have the same parameters, but {name} is missing or of another shape")
        differences.append(wide(state[name].detach().to(p.device)) - wide(p.detach()))
    return Vector(differences)


def line(problem: Problem, d: Vector, t: Sequence[float]) -> Line:
    """Return the mean loss at every ``w + t_i d``; an entry may be infinite or NaN.

    Args:
        problem: model, loss and data.
        d: the direction, one tensor a parameter.
        t: the places along it.

    Example:
        >>> line(problem, filter_normalised(problem), torch.linspace(-1, 1, 41).tolist())
        >>> line(problem, towards(problem, other_model), torch.linspace(-0.5, 1.5, 41).tolist())
    """
    return Line(tuple(t), _losses(problem, (s * d for s in t)))


def plane(problem: Problem, a: Vector, b: Vector, x: Sequence[float], y: Sequence[float]) -> Plane:
    """Return the mean loss at every ``w + x_i a + y_j b``.

    Args:
        problem: model, loss and data.
        a, b: the two directions.
        x, y: the places along each. The result has a row for every entry of ``y``.

    Example:
        >>> top = eigenpairs(Hessian(problem), k=2)
        >>> plane(problem, *top.vectors, x, y)  # the plane of the two sharpest directions
    """
    return Plane(tuple(x), tuple(y), tuple(_losses(problem, (s * a + r * b for s in x)) for r in y))


def _losses(problem: Problem, where: Iterable[Vector]) -> tuple[float, ...]:
    losses = []
    with problem.untouched():
        f = problem.oracle()
        for eps in where:
            with f.at(eps):
                losses.append(problem.mean_loss())
    return tuple(losses)
