"""Rules outside the template: functions from the oracle to the update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import TINY, Vector
from steppe.pieces.geometry import Euclidean
from steppe.pieces.protocol import Declaration, declared
from steppe.pieces.weights import EffectiveSize


@dataclass(frozen=True)
class BothWeighted:
    """``u = g + sum_i p_i grad f_i(w + eps) - d``, ``eps = rho d / norm(d)``, ``d = sum_i p_i grad f_i(w)``.

    The weights act on both gradients of the sharpness term. With ``p`` from the softmax of the norms this is the
    gradient (Danskin) of the objective that Reweighted SAM states (arXiv 2509.18001):
    ``max over P and eps of <sum_i p_i grad f_i(w), eps> + H(P) / lam``. For weights independent of the examples the
    mean update holds ``sum_i p_i^2 grad(tr V / 2)``, m-SAM's at ``m = 1 / sum_i p_i^2``; with a uniform second gradient
    (:class:`~steppe.Reweighted`) it is that of SAM, whatever the weights are. See the page on theory.

    ``g``, the norms and ``d`` come from one pass where the model factors. Elsewhere there are two passes more: the
    forward of the probe, ``g``'s own, and the forwards and backwards of ``d`` and the second gradient.

    Args:
        weights: ``(f) -> p``, shape ``(n,)``.
        geometry: as in :class:`~steppe.Rule`.
    """

    weights: Callable[[Oracle], Tensor] = EffectiveSize()
    geometry: Callable[[Oracle, Vector], Vector] = Euclidean()

    declares: ClassVar[Declaration] = Declaration(examples=True)

    def __call__(self, f: Oracle) -> Update:
        """Return one step's update."""
        with f.looking(declared(self)):
            p = self.weights(f)
            d = f.grad(weights=p)
            eps = f.rho * self.geometry(f, f.movable(d))
        with f.at(eps):
            g_adv = f.grad(weights=p)
        return Update(f.g + (g_adv - d))


@dataclass(frozen=True)
class Functional:
    """``u = J(w + eps)^T grad_F l(F(w))``: Functional SAM (arXiv 2502.02407).

    ``F`` is the model's output and ``J`` its Jacobian. The Jacobian is taken at ``w + eps``, the gradient of the loss
    by the output at ``w``: what the perturbation does to the outputs does not enter. Two passes: the first gives ``g``
    and the gradient at the outputs. The batch must be one of :meth:`steppe.Batch.supervised`.

    Args:
        geometry: as in :class:`~steppe.Rule`. With :class:`~steppe.Preconditioned` it is the paper's preconditioned
            Functional SAM.
    """

    geometry: Callable[[Oracle, Vector], Vector] = Euclidean()

    declares: ClassVar[Declaration] = Declaration(g=False, linear=True, examples=True)

    def __call__(self, f: Oracle) -> Update:
        """Return one step's update."""
        v = f.output_gradient()
        with f.looking(declared(self)):
            eps = f.rho * self.geometry(f, f.movable(f.g))
        with f.at(eps):
            return Update(f.pull_back(v))


@dataclass(frozen=True)
class Lookbehind:
    """``u = alpha sum_i h_i``, ``h_i`` the gradient at ``w + eps_1 + ... + eps_i``: Lookbehind (arXiv 2307.16704).

    Each ``eps_i = rho h_{i-1} / norm(h_{i-1})`` starts where the one before has led, ``h_0 = g``. In the paper fast
    weights take a step of the base optimizer along each ``h_i``, and the weights go the share ``alpha`` of their way.
    Beside SGD without momentum that is this update exactly; beside other bases, here the base sees the sum once,
    while there its momentum goes through all ``k`` steps. ``k + 1`` passes; the authors' code takes ``2 k``, as it does
    not use ``h_i`` for the ascent that follows.

    Args:
        k: how many steps, at least 1.
        alpha: the share, in (0, 1], or ``None`` for the paper's adaptive one: ``(1 + cos) / 2`` for each tensor, of the
            angle between ``h_1`` and the sum.
        geometry: as in :class:`~steppe.Rule`.

    Raises:
        ValueError: ``k`` is no positive integer, ``alpha`` is not in (0, 1].
    """

    k: int = 2
    alpha: float | None = 0.5
    geometry: Callable[[Oracle, Vector], Vector] = Euclidean()

    declares: ClassVar[Declaration] = Declaration(g=False)

    def __post_init__(self) -> None:
        checks.positive_integer("k", self.k)
        if self.alpha is not None:
            checks.positive_share("alpha", self.alpha)

    def __call__(self, f: Oracle) -> Update:
        """Return one step's update."""
        h = self.climb(f)
        first = total = next(h)
        for h_i in h:
            total = total + h_i
        return Update(total.map(_adapted, first) if self.alpha is None else self.alpha * total)

    def climb(self, f: Oracle) -> Iterator[Vector]:
        """Yield ``h_1``, ..., ``h_k``."""
        d, eps = f.g, None
        for _ in range(self.k):
            with f.looking(declared(self)):
                further = f.rho * self.geometry(f, f.movable(d))
            eps = further if eps is None else eps + further
            with f.at(eps):
                d = f.grad()
            yield d


@dataclass(frozen=True)
class GradientNorm:
    """``u = g + alpha rho H v``, the Hessian and the unit gradient ``v`` at ``w + eps``: GAM (arXiv 2303.03108).

    ``eps`` has the length ``rho`` and the direction in which the norm of the gradient rises fastest, ``H g / norm(g)``
    at ``w``. So the largest norm of a gradient in the ball is made small, not the largest loss. Both products with the
    Hessian are differences over the length ``rho``: ``rho H v`` is ``grad f(w + eps + rho v) - grad f(w + eps)``. Four
    passes; exact on quadratics. The authors' code takes such differences too, with a radius of their own.

    Args:
        alpha: the weight of the second term, at least 0.

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle) -> Update:
        """Return one step's update."""
        unit = Euclidean()
        with f.looking(declared(self)):
            with f.at(f.rho * unit(f, f.movable(f.g))):
                rise = f.grad() - f.g
            eps = f.rho * unit(f, f.movable(rise))
        with f.at(eps):
            h = f.grad()
        with f.at(eps + f.rho * unit(f, f.movable(h))):
            return Update(f.g + self.alpha * (f.grad() - h))


def _adapted(total: Tensor, first: Tensor) -> Tensor:
    """Return ``(1 + cos) / 2`` of the sum."""
    norms: Tensor = torch.linalg.vector_norm(total) * torch.linalg.vector_norm(first)
    return (1 + (total * first).sum() / (norms + TINY)) / 2 * total
