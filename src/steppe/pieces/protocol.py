"""What a piece may declare about itself, and the one place that reads it.

A piece is a frozen dataclass that is called with the :class:`~steppe.Oracle`. Its class attribute (or property)
``declares`` is a :class:`Declaration`. A piece that declares nothing works: it is carried out in the most general, and
most expensive, way. What is declared is relied upon, so a wrong declaration gives an error or a wrong step;
``tests/test_protocol.py`` checks the declaration of every piece against what the piece does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary


@dataclass(frozen=True)
class Declaration:
    """What a piece needs, what it remembers, and which shortcuts it allows.

    Attributes:
        g: ``combine``, or a rule, asks for ``f.g`` after the weights have moved. Without it ``g`` is freed before the
            second pass, which saves one copy of the parameters.
        g_adv: a rule takes the gradient at ``w + eps``. A rule without it makes its update of gradients at ``w``, which
            DDP averages in their backward passes.
        parts: takes parts of the batch, so ``step`` needs a :class:`~steppe.Batch` or a :class:`~steppe.MeanBatch`.
        examples: looks at single examples, so ``step`` needs a :class:`~steppe.Batch`.
        losses_at_w: asks for ``f.losses_at_w()`` at ``w + eps``.
        remembers: the names that it passes to ``f.recall`` and ``f.remember``.
        numbers: the names that it passes to ``f.recall_number`` and ``f.remember_number``.
        base_state: the names that it passes to ``f.base_state``.
        weights: ``sample`` is ``sum_i p_i grad f_i``, with ``p`` uniform, or ``p = piece.weights(norms)`` made from the
            norms of the per-example gradients.
        radial: ``geometry`` multiplies ``d`` by ``piece.radial(norm)``, a number made from the norm of ``d`` alone.
        whole_batch: ``select`` takes the whole batch.
        linear: ``combine`` is linear in ``(g, g_adv)`` and asks for no further gradient, so the mean of updates is the
            update of the means. With ``g=False`` the update is a multiple of ``g_adv``, and DDP averages that in its
            backward pass.
    """

    g: bool = True
    g_adv: bool = True
    parts: bool = False
    examples: bool = False
    losses_at_w: bool = False
    remembers: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    base_state: frozenset[str] = frozenset()
    weights: Literal["uniform", "norms"] | None = None
    radial: bool = False
    whole_batch: bool = False
    linear: bool = False

    def with_needs(self, other: Self) -> Self:
        """Return this declaration with what another one needs and remembers."""
        return replace(
            self,
            parts=self.parts or other.parts,
            examples=self.examples or other.examples,
            losses_at_w=self.losses_at_w or other.losses_at_w,
            remembers=self.remembers | other.remembers,
            numbers=self.numbers | other.numbers,
            base_state=self.base_state | other.base_state,
        )


def pieces_of(piece: object) -> Iterator[object]:
    """Yield a piece and the pieces that it is made of."""
    yield piece
    for part in fields(piece) if is_dataclass(piece) else ():
        yield from pieces_of(getattr(piece, part.name))


def declared(piece: Any) -> Declaration:
    """Return what a piece or a rule declares, with the needs and the memory of the pieces that it is made of."""
    try:
        known = _known.get(piece)
    except TypeError:  # no hash, or no weak references
        return _merged(piece)
    if known is None:
        known = _merged(piece)
        if is_dataclass(piece):  # frozen; what a function declares may change
            _known[piece] = known
    return known


def _merged(piece: Any) -> Declaration:
    own: Declaration = getattr(piece, "declares", Declaration())
    parts = [declared(getattr(piece, field.name)) for field in fields(piece)] if is_dataclass(piece) else []
    return reduce(Declaration.with_needs, parts, own)


_known: WeakKeyDictionary[Any, Declaration] = WeakKeyDictionary()  # asked for several times a step
