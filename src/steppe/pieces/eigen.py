"""The Hessian's top eigenvector in a perturbation, and in an update."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import TINY, Vector
from steppe.pieces.protocol import Declaration
from steppe.pieces.weights import FiniteDifference


@dataclass(frozen=True)
class Eigen:
    """``d / norm(d) + alpha sign(<d, v>) v'``: Eigen-SAM (arXiv 2501.12666).

    ``v`` is the eigenvector of the batch's Hessian whose eigenvalue is largest in size, by ``power`` steps of power
    iteration at steps 0, ``every``, 2 ``every``, ..., each two passes, which begin at the ``v`` before, and first at
    ``d``. ``v'`` is its part orthogonal to ``d``. As in the authors' code the sum is not normalised again. (There the
    first ``v`` is random and comes at step ``every``, and the Hessian is that of evaluation mode.)

    Micro-batches and ranks search each by itself and remember the mean of their ``v``, whose signs are made alike
    before: by the ``v`` remembered, and first by a fixed random vector. The mean, which is shorter where they
    differ, is used at length 1: ``v`` is a unit vector in the formula and in the authors' code.

    Args:
        alpha: the weight of the second term, at least 0; its length is ``alpha`` times the sine of the angle between
            ``d`` and ``v``.
        every: how many steps apart ``v`` is renewed.
        power: how many steps of power iteration.

    Raises:
        ValueError: ``alpha`` is negative, ``every`` or ``power`` is no positive integer.
    """

    alpha: float = 0.2
    every: int = 100
    power: int = 5

    declares: ClassVar[Declaration] = Declaration(remembers=frozenset({"eigenvector"}))

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)
        checks.positive_integer("every", self.every)
        checks.positive_integer("power", self.power)

    def __call__(self, f: Oracle, d: Vector) -> Vector:
        unit = d / (d.norm() + TINY)
        v = self.vector(f, unit)
        along = unit.dot(v)
        return unit + self.alpha * along.sign() * (v - along * unit)

    def vector(self, f: Oracle, first: Vector) -> Vector:
        """Return ``v``, of length 1 on the entries of ``first``, where the first search begins."""
        v = f.recall("eigenvector", default=first).where(t is not None for t in first.tensors)
        v = v / (v.norm() + TINY)  # of micro-batches and ranks the mean of several
        if f.step % self.every == 0:
            v = self.search(f, v)
            f.remember("eigenvector", v)
        return v

    def search(self, f: Oracle, v: Vector) -> Vector:
        """Return ``v`` after ``power`` steps; micro-batches and ranks give it the same sign."""
        for _ in range(self.power):
            Hv = f.movable(f.hvp(v))
            v = Hv / (Hv.norm() + TINY)
        side = v.dot(f.recall("eigenvector", default=FiniteDifference().direction(f.movable(f.w), 0)))
        return torch.where(side < 0, -1.0, 1.0) * v


@dataclass(frozen=True)
class EigenCorrected:
    """``a - alpha abs(<a, v>) v``, ``a = g_adv / norm(g_adv)``, ``v`` the Hessian's top eigenvector: X-SAM (arXiv
    2601.10251; the authors' code), a combine.

    ``v`` is found as by :class:`Eigen`, at ``w``. As in the authors' code the update has about the length 1 whatever
    the gradient's is, which asks for another learning rate, and the part along ``v`` is shortened where ``<a, v>`` is
    positive and lengthened where it is negative, though the sign of an eigenvector means nothing. (There nothing is
    corrected, or normalised, before the first search, at step ``every``.) :class:`SharpnessAware` with
    ``Rule(combine=EigenCorrected())`` costs two passes and ten more at every fifth step.

    Args:
        alpha: how much is taken off, at least 0.
        of: how ``v`` is found.

    Raises:
        ValueError: ``alpha`` is negative.
    """

    alpha: float = 0.2
    of: Eigen = Eigen(every=5)

    def __post_init__(self) -> None:
        checks.non_negative("alpha", self.alpha)

    def __call__(self, f: Oracle, g_adv: Vector) -> Update:
        a = g_adv / (g_adv.norm() + TINY)
        v = self.of.vector(f, a)
        return Update(a - self.alpha * a.dot(v).abs() * v)
