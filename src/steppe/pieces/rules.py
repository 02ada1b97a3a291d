"""Rules outside the template: functions from the oracle to the update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import Vector
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
