"""The perturbed parameters, one use of them, and the interception of torch functions that finds all uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Number
from types import FrameType
from typing import Any, TypeVar

from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from steppe.batch import Batch
from steppe.engine.oracle import Oracle
from steppe.factored.microbatches import Layout, MicroBatches

Small = dict[int, list[Tensor]]  # by parameter: the per-example gradients of its uses, (n, *shape)
Matrices = dict[int, list[Any]]  # by parameter: the factors of its uses
Index = tuple[int | None, int | None]  # of a weight and a bias; ``None`` where it is not perturbed, or not there
T = TypeVar("T")
ANY = object()  # the key of the layer for functions that have none of their own


class CannotFactor(Exception):  # noqa: N818
    """The micro-batch gradients of a model cannot be factored; the message says why.

    Args:
        reason: the message.
        final: whether that holds for every batch.
    """

    def __init__(self, reason: str, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


class Unsure(CannotFactor):
    """This batch cannot tell whether a model factors; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, final=False)


@dataclass(frozen=True)
class Tracked:
    """The perturbed parameters of a model.

    Attributes:
        parameters: id of the parameter -> index.
        names: index -> name.
        n: how many examples the batch has.
        tensors: index -> parameter.
        unbatched: the lookups, by order, whose indices belong to no example, such as position embeddings.
    """

    parameters: Mapping[int, int]
    names: Mapping[int, str]
    n: int
    tensors: Mapping[int, Tensor] = field(default_factory=dict, repr=False)
    unbatched: frozenset[int] = frozenset()

    @classmethod
    def of(cls, f: Oracle, batch: Batch) -> Tracked:
        """Return the parameters of the batch's model that have a radius above 0 and require a gradient."""
        names = {id(p): name for name, p in batch.model.named_parameters()}
        radii = zip(f.passes.parameters.tensors, f.rho.values, strict=True)
        tensors = {i: p for i, (p, rho) in enumerate(radii) if rho and p.requires_grad}
        known = {i: names.get(id(p), f"parameter {i}") for i, p in tensors.items()}
        return cls({id(p): i for i, p in tensors.items()}, known, len(batch), tensors)

    def of_tensors(self, tensors: Sequence[Tensor]) -> Tracked:
        """Return the same with other tensors in the place of the parameters."""
        other = {i: tensors[i] for i in self.tensors}
        return replace(self, parameters={id(p): i for i, p in other.items()}, tensors=other)

    def index(self, t: object) -> int | None:
        """Return the index of a tracked parameter, ``None`` for anything else."""
        return self.parameters.get(id(t))

    def pair(self, weight: object, bias: object) -> Index:
        """Return the indices of both."""
        return self.index(weight), self.index(bias)

    def first_in(self, args: Iterable[Any]) -> int | None:
        """Return the index of the first tracked parameter among arguments, also inside lists."""
        return first_in(self.parameters, args)


def first_in(known: Mapping[int, T], args: Iterable[Any]) -> T | None:
    """Return what is known, by its id, of the first argument of which anything is, also inside lists."""
    for a in args:
        found = first_in(known, a) if isinstance(a, list | tuple) else known.get(id(a))
        if found is not None:
            return found
    return None


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


def collect_copies(site: Site, matrices: Matrices, small: Small) -> None:
    """Add the gradients of copies: those of micro-batches as they are, those of rows summed by example."""
    gradients = site.sums(site.deltas[0]) if site.parts is None else site.deltas[0]
    for i, t in zip((site.weight, site.bias), gradients.unbind(1), strict=False):
        if i is not None:
            small.setdefault(i, []).append(t)


class Mode(TorchFunctionMode):
    """An interception that also surrounds what activation checkpointing computes again in the backward pass."""

    count = lookups = 0  # of what it counts so far, and of the lookups
    recomputing = False

    @contextmanager
    def again(self, place: tuple[int, int]) -> Iterator[None]:
        """Surround what is computed again from a place, ``(count, lookups)``, on: the same happens, in order."""
        before, active = (self.count, self.lookups), self in _get_current_function_mode_stack()
        (self.count, self.lookups), self.recomputing = place, True
        try:
            with nullcontext() if active else self:
                yield
        finally:
            (self.count, self.lookups), self.recomputing = before, False


class Interception(Mode):
    """The base of both passes: finds the layer of every torch function, and refuses a use that none understands.

    A layer has ``run``, which makes what a torch function returns in either pass, or ``NotImplemented`` where it does
    not support the call; and ``collect``, for the gradients of the uses that the first pass has recorded.

    Args:
        tracked: the perturbed parameters.
        layers: torch function -> layer.
        parts: the micro-batches within which examples may influence one another; ``None`` where none may.
        proven: the calls of torch functions that a rehearsal has made.
    """

    def __init__(
        self, tracked: Tracked, layers: Mapping[Any, Any], parts: MicroBatches | None, proven: Set[Any] = frozenset()
    ) -> None:
        super().__init__()
        self.tracked, self.layers, self.parts, self.proven = tracked, layers, parts, proven
        self.sites: list[Site] = []
        self.derived: dict[int, Any] = {}  # by id, the functions of parameters alone
        self.mixes = False  # whether examples of a micro-batch influence one another
        self.statistics: list[Any] = []  # those of each micro-batch, from each batch normalisation
        self.inside = 0  # whether a layer is at work, and how deep: what it does with parameters is understood
        self.running = False  # whether the forward pass is
        self.calls: set[Any] = set()  # of torch functions that no rehearsal has made
        self.call: Any = None  # the last one

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (*args, *(kwargs := kwargs or {}).values())
        self.called(func, arguments, sys._getframe(1))
        transformed = peek_interpreter_stack() is not None
        derived = bool(self.derived) and first_in(self.derived, arguments) is not None
        layer = None if transformed or derived else self.layers.get(func)
        made = NotImplemented if layer is None else self.at_work(layer.run, func, *args, **kwargs)
        if made is not NotImplemented:
            return made
        index = self.first_in(map(_unwrapped, arguments) if transformed else arguments)
        if index is None or name_of(func) in HARMLESS:
            return func(*args, **kwargs)
        if transformed:
            raise CannotFactor(f"{self.tracked.names[index]} is used by {name_of(func)} inside torch.func")
        return self.at_work(self.layers[ANY].run, func, *args, **kwargs)

    def called(self, func: Any, arguments: Iterable[Any], frame: FrameType) -> None:
        """Note a call that no rehearsal has made: another function, place, dimension, or number not zero."""
        numbers = tuple([_about(a) for a in arguments if not isinstance(a, Tensor)])
        self.call = func, frame.f_code, frame.f_lasti, numbers  # code made anew is equal code
        if self.call not in self.proven:
            self.calls.add(self.call)

    def first_in(self, args: Iterable[Any]) -> int | None:
        """Return the index of the first perturbed parameter among arguments, or among what is made of parameters."""
        args = list(args)
        index = self.tracked.first_in(args)
        if index is None and self.derived:
            derived = first_in(self.derived, args)
            index = None if derived is None else derived.parameters[0]
        return index

    def copies(
        self, layer: Any, of: Sequence[Tensor], index: Index, rows: int, parts: MicroBatches | None = None
    ) -> Tensor:
        """Return one parameter, or two of a shape, for each row or micro-batch: ``(rows, 1 or 2, *shape)``.

        Args:
            layer: the layer that uses them; :func:`collect_copies` collects their gradients.
            of: the parameters.
            index: their indices; one of two may be fixed.
            rows: how many rows there are, with examples in them, or micro-batches.
            parts: the micro-batches, where each has a copy.
        """
        raise NotImplementedError

    def at_work(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Return what a layer makes, which knows what it does with parameters."""
        self.inside += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            self.inside -= 1


HARMLESS = {
    *("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf", "layout", "grad", "is_sparse"),
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "get_device"),
    *("is_complex", "data_ptr", "__len__", "is_nested", "is_mkldnn", "is_quantized", "is_meta", "__hash__", "names"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}  # functions that do not use a parameter's value


def _about(a: Any) -> Any:
    """Return what may tell how a call mixes examples, whatever their sizes: a dimension, an equation, a zero."""
    if a is None or isinstance(a, str):
        return a
    if isinstance(a, int):
        return max(-9, min(a, 2))
    if isinstance(a, list | tuple):
        return tuple([_about(b) for b in a if not isinstance(b, Tensor)])
    if isinstance(a, slice):
        return _about((a.start, a.stop, a.step))
    return isinstance(a, Number) and bool(a)  # one of NumPy, too


def _unwrapped(t: Any) -> Any:
    """Return what a tensor inside ``torch.func`` stands for."""
    while isinstance(t, Tensor) and is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function, or of the property that it reads."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
