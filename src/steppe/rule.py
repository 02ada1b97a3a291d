"""The template of every method, and rules made of rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from operator import add
from typing import ClassVar

from torch import Tensor

from steppe.batch import Batches
from steppe.engine import checks
from steppe.engine.oracle import Oracle
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.factored.micro import cheaper_in_parallel, in_parallel
from steppe.pieces.combine import Perturbed
from steppe.pieces.geometry import Euclidean
from steppe.pieces.sample import Exact, Mean
from steppe.pieces.select import All

AnyRule = Callable[[Oracle], Update]  # any function from oracle to update is a rule


@dataclass(frozen=True)
class Rule:
    """Look, see, move: the template that all methods share.

    ``eps = rho * geometry(sample)``, ``g_adv`` = the gradient at ``w + eps`` on ``select``, and ``combine`` makes the
    update of both. The default pieces are SAM (Foret et al. 2021, arXiv 2010.01412). Every piece is a function whose
    first argument is the :class:`~steppe.engine.oracle.Oracle`.

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
        """One step's update."""
        if self.shares_passes() and not (f.keep_g or self.uses_g) and cheaper_in_parallel(f):
            update = in_parallel(f, len(f.batch()), self)
            if update is not None:
                return update
        keep = {"keep_g": self.uses_g, "know_losses": looks_inside(self.select)}
        with f.at(self.perturbation(f), **keep):  # look
            g_adv = f.grad(on=self.select(f), final=self.ends_with_g_adv)  # see
        f.compare(g_adv)
        return self.combine(f, g_adv)  # move

    @property
    def uses_g(self) -> bool:
        """Whether ``combine`` wants the gradient at ``w``."""
        return bool(getattr(self.combine, "uses_g", True))

    @property
    def ends_with_g_adv(self) -> bool:
        """Whether the update is ``g_adv`` alone."""
        return isinstance(self.combine, Perturbed)

    def perturbation(self, f: Oracle) -> Vector:
        """``eps``; parameters whose group has rho 0 take no part, not even in the norm."""
        return f.rho * self.geometry(f, f.movable(self.sample(f)))

    def shares_passes(self) -> bool:
        """Whether its micro-batches can share two passes: the mean gradient, a radial geometry, linear after."""
        exact = isinstance(self.sample, Mean) or isinstance(getattr(self.sample, "probe", None), Exact)
        return (
            exact
            and isinstance(self.select, All)
            and hasattr(self.geometry, "radial")
            and getattr(self.combine, "linear", False)
        )


@dataclass(frozen=True)
class Plain:
    """The base optimizer's own step: one pass."""

    only_g: ClassVar[bool] = True

    def __call__(self, f: Oracle) -> Update:
        """The gradient at ``w``."""
        return Update(f.shared_g)


@dataclass(frozen=True)
class Micro:
    """m-SAM: the rule on every micro-batch of ``m`` examples by itself, averaged with weights ``size / n``.

    ``u = sum_j |I_j| / |B| u(I_j)`` (Foret et al. 2021, section 4.1; arXiv 2509.18001). ``m`` at or above the batch
    size is the rule itself. Where the passes cannot be shared they run one micro-batch after the other: as many
    examples, ``n / m`` times as many calls. Batch normalisation sees micro-batches, as in gradient accumulation.
    Micro-batches cross neither from one accumulated batch into the next nor from rank to rank.

    Raises:
        ValueError: ``m`` is no positive integer.
        TypeError: in ``step``, where the closure is no :class:`~steppe.Batch`.
    """

    m: int
    rule: AnyRule = Rule()

    per_example: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.positive_integer("m", self.m)

    def __call__(self, f: Oracle) -> Update:
        """The weighted mean of the parts' updates."""
        f.ranks.stay_within()
        if isinstance(f.closure, Batches):
            return reduce(add, (share * self(chunk) for share, chunk in f.chunks()))
        if isinstance(self.rule, Rule) and self.rule.shares_passes() and self.worth_sharing(f):
            update = in_parallel(f, self.m, self.rule)
            if update is not None:
                return update
        return reduce(add, (share * self.rule(part) for share, part in f.split(self.m)))

    def worth_sharing(self, f: Oracle) -> bool:
        """Whether to try shared passes: one part, or on a CPU two, gain by them only where plain SAM does."""
        few = 1 if f.parameters.devices else 2
        several = len(f.batch()) > few * self.m
        return bool(f.parallel) and (several or f.parallel is True or cheaper_in_parallel(f))


def micro(m: int | None, rule: AnyRule) -> AnyRule:
    """``rule`` on micro-batches of ``m``; ``None`` is the whole batch."""
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
        """This step's update."""
        return (self.between if f.step % self.k else self.rule)(f)


def memories(piece: object) -> set[str]:
    """What a rule's pieces remember from step to step."""
    names = set(getattr(piece, "remembers", ()))
    if is_dataclass(piece):
        names.update(*(memories(getattr(piece, field.name)) for field in fields(piece)))
    return names


def looks_inside(piece: object) -> bool:
    """Whether a rule, or any piece of it, needs the examples of the batch."""
    if getattr(piece, "per_example", False):
        return True
    return is_dataclass(piece) and any(looks_inside(getattr(piece, field.name)) for field in fields(piece))
