"""The template of every method, and rules made of rules."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.pieces.combine import Perturbed
from steppe.pieces.geometry import Euclidean
from steppe.pieces.protocol import Declaration, declared
from steppe.pieces.sample import Mean
from steppe.pieces.select import All


@dataclass(frozen=True)
class Rule:
    """Look, see, move: the template that all methods share.

    ``eps = rho * geometry(sample)``, ``g_adv`` = the gradient at ``w + eps`` on ``select``, and ``combine`` makes the
    update of both. The default pieces are SAM (Foret et al. 2021, arXiv 2010.01412). Every piece is a function whose
    first argument is the :class:`~steppe.Oracle`.

    Args:
        sample: ``(f) -> Vector``, the stochastic gradient to ascend by.
        geometry: ``(f, d) -> Vector``, the unit step of steepest ascent along ``d``.
        select: ``(f) -> indices | None``, asked at ``w + eps``: the examples of the second gradient.
        combine: ``(f, g_adv) -> Update``.

    Example:
        >>> rule = Rule(sample=Reweighted(lam=0.5), geometry=Adaptive(eta=0.01), combine=Weighted(gamma=0.9))
        >>> optimizer = SharpnessAware(base, Micro(16, rule), rho=0.05)
    """

    sample: Callable[[Oracle], Vector] = Mean()
    geometry: Callable[[Oracle, Vector], Vector] = Euclidean()
    select: Callable[[Oracle], Tensor | None] = All()
    combine: Callable[[Oracle, Vector], Update] = Perturbed()

    def __call__(self, f: Oracle) -> Update:
        """Return one step's update."""
        with f.at(self.perturbation(f)):  # look
            g_adv = f.grad(on=self.select(f))  # see
        return self.combine(f, g_adv)  # move

    def perturbation(self, f: Oracle) -> Vector:
        """Return ``eps``; parameters whose group has rho 0 take no part, not even in the norm."""
        with f.looking(declared(self)):
            return f.rho * self.geometry(f, f.movable(self.sample(f)))

    @property
    def declares(self) -> Declaration:
        """Which gradients the update is made of, and how."""
        combine = declared(self.combine)
        return Declaration(g=combine.g, linear=combine.linear)


@dataclass(frozen=True)
class Plain:
    """The base optimizer's own step: one pass."""

    declares: ClassVar[Declaration] = Declaration(g_adv=False)

    def __call__(self, f: Oracle) -> Update:
        """Return the gradient at ``w``."""
        return Update(f.g)


@dataclass(frozen=True)
class Micro:
    """m-SAM: the rule on every micro-batch of ``m`` examples by itself, averaged with weights ``size / n``.

    ``u = sum_j |I_j| / |B| u(I_j)`` (Foret et al. 2021, section 4.1; arXiv 2509.18001). ``m`` at or above the batch
    size is the rule itself. Micro-batches share two passes over the whole batch where the model allows it
    (:mod:`steppe.factored`). Elsewhere they run in a loop: the same examples in ``n / m`` times as many passes. Batch
    normalisation sees micro-batches, as in gradient accumulation.

    Raises:
        ValueError: ``m`` is no positive integer.
        TypeError: in ``step``, where the closure is no :class:`~steppe.Batch`.
    """

    m: int
    rule: AnyRule = Rule()

    def __post_init__(self) -> None:
        checks.positive_integer("m", self.m)

    def __call__(self, f: Oracle) -> Update:
        """Return the weighted mean of the micro-batches' updates."""
        return f.average(self.rule, self.m)

    @property
    def declares(self) -> Declaration:
        """The rule's, and the examples."""
        return replace(declared(self.rule), examples=True)


def micro(m: int | None, rule: AnyRule) -> AnyRule:
    """Return ``rule`` on micro-batches of ``m``; ``None`` is the whole batch."""
    return rule if m is None else Micro(m, rule)


@dataclass(frozen=True)
class Every:
    """``rule`` at steps 0, k, 2k, ..., and ``between`` at the others.

    Raises:
        ValueError: ``k`` is no positive integer.
    """

    k: int
    rule: AnyRule = Rule()
    between: AnyRule = Plain()

    def __post_init__(self) -> None:
        checks.positive_integer("k", self.k)

    def __call__(self, f: Oracle) -> Update:
        """Return this step's update."""
        return f.average(self.at(f.step))

    @property
    def declares(self) -> Declaration:
        """The gradients that either rule asks for."""
        rule, between = declared(self.rule), declared(self.between)
        return Declaration(g=rule.g or between.g, g_adv=rule.g_adv or between.g_adv)

    def at(self, step: int) -> AnyRule:
        """Return the rule of this step."""
        return self.between if step % self.k else self.rule


def rule_at(rule: AnyRule, step: int) -> AnyRule:
    """Return the rule that a rule made of rules takes at this step."""
    while isinstance(rule, Every):
        rule = rule.at(step)
    return rule
