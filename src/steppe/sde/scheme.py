"""The optimizer that an equation approximates: a rule, its step size, its radius, its batches."""

from dataclasses import dataclass

from steppe.engine import checks
from steppe.engine.oracle import AnyRule
from steppe.pieces.combine import Perturbed
from steppe.pieces.geometry import Euclidean, Unnormalised
from steppe.pieces.sample import Mean, OnFull
from steppe.pieces.select import All
from steppe.rule import Micro, Plain, Rule
from steppe.sde.finite_sum import SDEError

KNOWN = {"sample": (Mean, OnFull), "geometry": (Euclidean, Unnormalised), "select": (All,), "combine": (Perturbed,)}


@dataclass(frozen=True)
class Scheme:
    """``x <- x - lr u``, ``u`` a rule's update on a random batch: SGD, USAM or SAM in n-, mini-batch or m-form.

    Args:
        rule: ``Plain()`` (SGD), ``Rule(geometry=Unnormalised())`` (USAM) or ``Rule()`` (SAM). ``Micro(m, ...)`` around
            it is the m-form, ``sample=OnFull()`` in it the n-form.
        lr: the learning rate, eta in the papers.
        rho: the radius.
        size: number of examples in a batch.
        replacement: whether a batch may hold an example twice. Training by epochs does not.

    Raises:
        SDEError: the rule has no equation here; the message names the piece.
        ValueError: a number is out of its range.

    Example:
        >>> m_usam = Scheme(Micro(2, Rule(geometry=Unnormalised())), lr=0.1, rho=0.05, size=4)
    """

    rule: AnyRule
    lr: float
    rho: float
    size: int
    replacement: bool = False

    def __post_init__(self) -> None:
        checks.positive("lr", self.lr)
        checks.non_negative("rho", self.rho)
        checks.positive_integer("size", self.size)
        if self.full and isinstance(self.rule, Micro):
            raise SDEError("no equation for micro-batches of the n-form: they share one perturbation; leave Micro out")
        if self.size % self.m:
            raise SDEError(f"size must be a multiple of m, got {self.size} examples in micro-batches of {self.m}")

    @property
    def m(self) -> int:
        """Return the number of examples that share a perturbation, a micro-batch's or the batch's."""
        return min(self.rule.m, self.size) if isinstance(self.rule, Micro) else self.size

    @property
    def inner(self) -> Plain | Rule:
        """Return the rule of a micro-batch; raise :class:`SDEError` if it has no equation."""
        inner = self.rule.rule if isinstance(self.rule, Micro) else self.rule
        if isinstance(inner, Plain):
            return inner
        if not isinstance(inner, Rule):
            raise SDEError(f"no equation for the rule {inner!r}: only for Plain() and Rule(...), bare or in Micro")
        for name, kinds in KNOWN.items():
            if not isinstance(piece := getattr(inner, name), kinds):
                known = " or ".join(f"{kind.__name__}()" for kind in kinds)
                raise SDEError(f"no equation for a rule with {name}={piece!r}: only for {known}")
        return inner

    @property
    def full(self) -> bool:
        """Return True if the perturbation follows the full gradient (n-form)."""
        return isinstance(self.inner, Rule) and isinstance(self.inner.sample, OnFull)
