"""The template of every method, and rules made of rules."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from steppe.engine import checks
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.sampling import sampled_average
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.pieces.combine import Perturbed
from steppe.pieces.geometry import Euclidean
from steppe.pieces.protocol import Declaration, declared, pieces_of
from steppe.pieces.sample import Mean, Subset
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

    With ``sampled=k`` only ``k`` random micro-batches are taken, and ``u = g + (1 / k) sum_j [u(S_j) - g(S_j)]``: m-SAM
    in expectation on every model that can run on a part of its batch, for ``1 + 2 k m / n`` passes, or ``1 + k m / n``
    where nothing mixes examples (:func:`~steppe.engine.sampling.sampled_average`). With ``clip=c`` the correction
    ``v = (1 / k) sum_j [u(S_j) - g(S_j)]`` is scaled by ``min(1, c norm(g) / norm(v))``, and what moves beside the base
    by the same factor; under DDP every rank does so.

    Args:
        m: examples in a micro-batch.
        rule: the rule of every micro-batch.
        sampled: how many micro-batches to draw at every step; ``None`` takes all of them.
        seed: of the draws, which depend on it, the step and the rank alone.
        clip: the largest norm of the correction, in units of ``norm(g)``; needs ``sampled``. ``None`` is any.

    Raises:
        ValueError: ``m`` or ``sampled`` is no positive integer, ``clip`` is not above 0 or without ``sampled``, or
            ``rule`` holds a :class:`WhereSteep` around a rule with a memory.
        TypeError: in ``step``, where the closure is no :class:`~steppe.Batch`.
    """

    m: int
    rule: AnyRule = Rule()
    sampled: int | None = None
    seed: int = 0
    clip: float | None = None

    def __post_init__(self) -> None:
        checks.positive_integer("m", self.m)
        if self.sampled is not None:
            checks.positive_integer("sampled", self.sampled)
        if self.clip is not None:
            checks.positive("clip", self.clip, "a number > 0 or None")
            if self.sampled is None:
                raise ValueError(f"clip needs sampled=, whose correction it limits, got clip={self.clip!r}")
        for piece in pieces_of(self.rule):
            if isinstance(piece, WhereSteep) and (declared(piece.rule).remembers or declared(piece.rule).numbers):
                raise ValueError(
                    "rule must not remember anything inside a WhereSteep inside Micro: some micro-batches would take "
                    f"it, others not. Write WhereSteep(Micro(...)), one choice for the batch; got {self.rule!r}"
                )

    def __call__(self, f: Oracle) -> Update:
        """Return the weighted mean of the micro-batches' updates, or an estimate of it from some of them."""
        if self.sampled is None:
            return f.average(self.rule, self.m)
        return sampled_average(f, self.rule, self.m, self.sampled, self.seed, self.clip)

    def __repr__(self) -> str:
        some = "" if self.sampled is None else f", sampled={self.sampled}, seed={self.seed}"
        limit = "" if self.clip is None else f", clip={self.clip}"
        return f"Micro(m={self.m}, rule={self.rule!r}{some}{limit})"

    @property
    def declares(self) -> Declaration:
        """The rule's, and parts of the batch."""
        return replace(declared(self.rule), parts=True)


@dataclass(frozen=True)
class Every:
    """``rule`` at steps 0, k, 2k, ..., and ``between`` at the others.

    Args:
        k: how many steps apart, at least 1.
        rule: at steps 0, ``k``, 2 ``k``, ...
        between: at all other steps; :class:`Plain` is the base optimizer's own step.

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
        return f.update(self.at(f.step))

    @property
    def declares(self) -> Declaration:
        """The gradients that either rule asks for."""
        rule, between = declared(self.rule), declared(self.between)
        return Declaration(g=rule.g or between.g, g_adv=rule.g_adv or between.g_adv)

    def at(self, step: int) -> AnyRule:
        """Return the rule of this step."""
        return self.between if step % self.k else self.rule


@dataclass(frozen=True)
class WhereSteep:
    """``rule`` where ``norm(g)^2 >= mu + c sigma``, elsewhere the base optimizer's own step: AE-SAM.

    ``mu <- decay mu + (1 - decay) norm(g)^2`` and ``sigma^2 <- decay sigma^2 + (1 - decay) (norm(g)^2 - mu)^2`` follow
    the squared norm (Jiang et al. 2023, arXiv 2304.14647). ``c`` goes from ``start`` to ``end`` in a straight line over
    ``steps`` steps. The first ``mu`` is the first squared norm, and the first ``sigma`` 0: our choice. Every step waits
    for the device once. Under data parallelism all ranks take the mean of their squared norms, and one way. ``g`` is
    held until the step ends, so SAM inside needs memory for one copy of the parameters more than SAM alone.

    Args:
        rule: where the gradient is long.
        start, end: ``c`` at step 0 and from step ``steps`` on.
        steps: over which ``c`` goes from one to the other, at least 1.
        decay: of the running mean and deviation, in [0, 1].

    Raises:
        ValueError: ``steps`` is no positive integer, ``decay`` is not in [0, 1].
    """

    rule: AnyRule = Rule()
    start: float = 0.0
    end: float = 0.0
    steps: int = 1
    decay: float = 0.9

    def __post_init__(self) -> None:
        checks.positive_integer("steps", self.steps)
        checks.share("decay", self.decay)

    def __call__(self, f: Oracle) -> Update:
        """Return this step's update."""
        square = f.g.norm() ** 2
        now = float(f.passes.ranks.mean_number(square) if f.is_whole else square)
        mu = self.decay * f.recall_number("mu", default=now) + (1 - self.decay) * now
        variance = self.decay * f.recall_number("variance", default=0.0) + (1 - self.decay) * (now - mu) ** 2
        f.remember_number("mu", mu)
        f.remember_number("variance", variance)
        c = self.start + (self.end - self.start) * min(1.0, f.step / self.steps)
        return f.update(self.rule if now >= mu + c * variance**0.5 else Plain())

    @property
    def declares(self) -> Declaration:
        """The squared norm's mean and variance, beside what the rule declares."""
        return Declaration(numbers=frozenset({"mu", "variance"}))


def on_micro_batches(
    rule: AnyRule,
    m: int | None = None,
    sampled: int | None = None,
    ascent: int | None = None,
    clip: float | None = None,
) -> AnyRule:
    """Return ``rule`` on micro-batches of ``m``, of which ``sampled`` are drawn; ``m=None`` is the whole batch.

    With ``ascent`` the perturbation comes from that many random examples; ``clip`` limits the correction of a sample.
    Of :class:`Every` and :class:`WhereSteep` the rule inside is changed.

    Raises:
        ValueError: ``sampled`` without ``m``, ``clip`` without ``sampled``, ``ascent`` with ``m``, or ``ascent`` of a
            rule whose perturbation does not come from the batch.
    """
    if m is None and sampled is not None:
        raise ValueError(f"sampled needs m=, the size of the micro-batches that it draws, got sampled={sampled!r}")
    if m is None and clip is not None:
        raise ValueError(f"clip needs m= and sampled=, whose correction it limits, got clip={clip!r}")
    if m is not None and ascent is not None:
        raise ValueError(f"ascent must be None beside m=, which gives every micro-batch its own, got ascent={ascent!r}")
    if isinstance(rule, Every | WhereSteep):
        return replace(rule, rule=on_micro_batches(rule.rule, m, sampled, ascent, clip))
    if ascent is not None:
        return _from_subset(rule, ascent)
    return rule if m is None else Micro(m, rule, sampled, clip=clip)


def _from_subset(rule: AnyRule, m: int) -> Rule:
    if not isinstance(rule, Rule):
        raise ValueError(f"ascent must be None for a rule that is no Rule with a sample, got {rule!r}")
    try:
        return replace(rule, sample=Subset(m, rule.sample))
    except ValueError as error:
        raise ValueError(f"ascent={m!r}: {error}") from None


def rule_at(rule: AnyRule, step: int) -> AnyRule:
    """Return the rule that a rule made of rules takes at this step."""
    while isinstance(rule, Every):
        rule = rule.at(step)
    return rule
