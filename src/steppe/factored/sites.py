"""One use of perturbed parameters, and the interception of torch functions that finds them all."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from steppe.factored.microbatches import Layout, MicroBatches
from steppe.factored.tracked import HARMLESS, CannotFactor, Tracked, name_of, unwrapped

Small = dict[int, list[Tensor]]  # by parameter: the per-example gradients of its uses, (n, *shape)
Matrices = dict[int, list[Any]]  # by parameter: the factors of its uses
NUMBERS = {bool, int, float}
ANY = object()  # the key of the layer for functions that have none of their own


@dataclass
class Site:
    """One use of perturbed parameters in a forward pass.

    Attributes:
        layer: the layer (:mod:`steppe.factored.layers`) that handles it.
        weight: the index of the weight, ``None`` where that is not perturbed.
        bias: the index of the bias, likewise.
        kept: the layer's input, or what else it needs for the gradient.
        leading: the sizes of the dimensions in which examples lie.
        map: the bilinear map of a layer with a weight matrix.
        deltas: the gradients of the output, one for each backward pass.
        layout: which rows belong to which example.
        version: the version counter of ``kept`` when it was recorded.
        parts: the micro-batches, where the parameter has a copy for each of them: ``deltas`` are then ``(k, *shape)``.
        freed: whether what was recorded has been used and freed.
        awaited: whether ``kept`` is to come when activation checkpointing computes it again.
        lookup: which lookup of the pass it is.
    """

    layer: Any
    weight: int | None
    bias: int | None
    kept: Tensor | None
    leading: tuple[int, ...]
    map: Any = None
    deltas: list[Tensor] = field(default_factory=list)
    layout: Layout | None = None
    version: int = 0
    parts: MicroBatches | None = None
    freed: bool = False
    awaited: bool = False
    lookup: int = 0

    def free(self) -> None:
        """Free the recorded tensors."""
        self.freed, self.kept = True, None
        self.deltas.clear()

    def by_example(self, t: Tensor) -> Tensor:
        """Return a tensor with this site's leading dimensions as ``(n, q, ...)``."""
        assert self.layout is not None
        return self.layout.by_example(t if len(self.leading) == 1 else t.flatten(0, len(self.leading) - 1))

    def sums(self, t: Tensor) -> Tensor:
        """Return the sums over the rows of each example: ``(n, ...)``."""
        t = self.by_example(t)
        return t[:, 0] if t.shape[1] == 1 else t.sum(1)

    def by_row(self, t: Tensor) -> Tensor:
        """Invert :meth:`by_example`."""
        assert self.layout is not None
        t = self.layout.by_row(t)
        return t if len(self.leading) == 1 else t.reshape(*self.leading, *t.shape[1:])


class Interception(TorchFunctionMode):
    """The base of both passes: finds the layer of every torch function, and refuses a use that none understands.

    A layer has ``record`` for the first pass, ``collect`` for the gradients of its uses, and ``evaluate`` for the
    second. ``record`` and ``evaluate`` return ``NotImplemented`` where they do not support the call.

    Args:
        tracked: the perturbed parameters.
        layers: torch function -> layer.
        parts: the micro-batches within which examples may influence one another; ``None`` where none may.
    """

    method: str

    def __init__(self, tracked: Tracked, layers: Mapping[Any, Any], parts: MicroBatches | None) -> None:
        super().__init__()
        self.tracked, self.layers, self.parts = tracked, layers, parts
        self.sites: list[Site] = []
        self.count, self.lookups = 0, 0  # of the sites, and of the lookups, so far
        self.derived: dict[int, Any] = {}  # by id, the functions of parameters alone
        self.mixes = False  # whether examples of a micro-batch influence one another
        self.statistics: list[Any] = []  # those of each micro-batch, from each batch normalisation
        self.inside = 0  # whether a layer is at work, and how deep: what it does with parameters is understood
        self.running = False  # whether the forward pass is
        self.proven: Set[Any] = frozenset()  # the calls of torch functions that a rehearsal has made
        self.calls: set[Any] = set()  # others
        self.recomputing = False  # whether activation checkpointing runs a part of it again, in the backward pass

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = (*args, *kwargs.values())
        self.called(func, arguments, sys._getframe(1))
        transformed = peek_interpreter_stack() is not None
        layer = None if transformed or (self.derived and self.derives(arguments) is not None) else self.layers.get(func)
        if layer is not None:
            self.inside += 1
            try:
                made = getattr(layer, self.method)(self, func, *args, **kwargs)
            finally:
                self.inside -= 1
            if made is not NotImplemented:
                return made
        index = self.first_in(map(unwrapped, arguments) if transformed else arguments)
        if index is None or name_of(func) in HARMLESS:
            return func(*args, **kwargs)
        if transformed:
            raise CannotFactor(f"{self.tracked.names[index]} is used by {name_of(func)} inside torch.func")
        with self.understood():
            return getattr(self.layers[ANY], self.method)(self, func, args, kwargs)

    def called(self, func: Any, arguments: Iterable[Any], frame: FrameType) -> None:
        """Note a call that no rehearsal has made: another function or place in the code, or a number no longer zero."""
        numbers = tuple([bool(a) for a in arguments if type(a) in NUMBERS])
        call = func, frame.f_code, frame.f_lasti, numbers  # code made anew is equal code
        if call not in self.proven:
            self.calls.add(call)

    def first_in(self, arguments: Iterable[Any]) -> int | None:
        """Return the index of the first perturbed parameter among arguments, or among what is made of parameters."""
        arguments = list(arguments)
        index = self.tracked.first_in(arguments)
        return index if index is not None or not self.derived else self.derives(arguments)

    def derives(self, arguments: Iterable[Any]) -> int | None:
        """Return the index of a parameter from which, with no examples, an argument is made; also inside lists."""
        for a in arguments:
            known = self.derived.get(id(a))
            index = known.parameters[0] if known else self.derives(a) if isinstance(a, list | tuple) else None
            if index is not None:
                return index
        return None

    def scale_and_shift(
        self, layer: Any, both: Sequence[Tensor], index: Sequence[int | None], rows: int, parts: MicroBatches | None
    ) -> Tensor:
        """Return scale and shift of each row or micro-batch, ``(rows, 2, C)``; the one or the other may be fixed."""
        raise NotImplementedError

    def copies_by_part(self, layer: Any, p: Tensor, index: int, parts: MicroBatches) -> Tensor:
        """Return the parameter of each micro-batch, ``(k, *p.shape)``."""
        raise NotImplementedError

    def place(self) -> tuple[int, int]:
        """Return where the pass is, for :meth:`again`."""
        return self.count, self.lookups

    @contextmanager
    def again(self, place: tuple[int, int]) -> Iterator[None]:
        """Surround what activation checkpointing computes again from a place on: the same uses, in order."""
        before = self.recomputing, self.count, self.lookups
        self.recomputing, (self.count, self.lookups) = True, place
        try:
            with self:
                yield
        finally:
            self.recomputing, self.count, self.lookups = before

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Surround the work of a layer, which knows what it does with parameters."""
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
