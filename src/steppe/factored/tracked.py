"""The perturbed parameters of a model, and how a use of one of them is recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from steppe.batch import Batch
from steppe.engine.oracle import Oracle


class CannotFactor(Exception):  # noqa: N818
    """The micro-batch gradients of a model cannot be factored; the message says why."""

    final = True


class Mixes(CannotFactor):
    """Examples influence one another, and gradients of single examples are asked for; micro-batches may do."""


class Unsure(CannotFactor):
    """This batch cannot tell whether a model factors; the message says why."""

    final = False


class Differs(CannotFactor):
    """Shared passes and the serial loop, or two examples, differ by more than rounding."""

    def __init__(self, reason: str, final: bool = True) -> None:
        super().__init__(reason)
        self.final = final


class OtherPath(Unsure):
    """The model takes another path at ``w + eps`` than at ``w``: it decides by the data of the whole batch."""

    def __init__(self) -> None:
        super().__init__("the second forward pass uses other parameters than the first")


class NotProven(Unsure):
    """A forward pass does other things than those that were proven."""

    def __init__(self, structure: tuple[Any, ...]) -> None:
        super().__init__("the forward pass does other things than those that were verified")
        self.structure = structure


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
        index = {id(p): i for i, (p, rho) in enumerate(radii) if rho and p.requires_grad}
        tensors = {i: f.passes.parameters.tensors[i] for i in index.values()}
        return cls(index, {i: names.get(p, f"parameter {i}") for p, i in index.items()}, len(batch), tensors)

    def of_tensors(self, tensors: Sequence[Tensor]) -> Tracked:
        """Return the same with other tensors in the place of the parameters."""
        other = {i: tensors[i] for i in self.tensors}
        return replace(self, parameters={id(p): i for i, p in other.items()}, tensors=other)

    def of_size(self, n: int) -> Tracked:
        """Return the same for a batch of ``n`` examples."""
        return self if n == self.n else replace(self, n=n)

    def index(self, t: object) -> int | None:
        """Return the index of a tracked parameter, ``None`` for anything else."""
        return self.parameters.get(id(t))

    def first_in(self, args: Iterable[Any]) -> int | None:
        """Return the index of the first tracked parameter among arguments, also inside lists."""
        for a in args:
            index = self.first_in(a) if isinstance(a, list | tuple) else self.parameters.get(id(a))
            if index is not None:
                return index
        return None


HARMLESS = {
    *("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf", "layout", "grad", "is_sparse"),
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "get_device"),
    *("is_complex", "data_ptr", "__len__", "is_nested", "is_mkldnn", "is_quantized", "is_meta", "__hash__", "names"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
}  # functions that do not use a parameter's value


def unwrapped(t: Any) -> Any:
    """Return what a tensor inside ``torch.func`` stands for."""
    while isinstance(t, Tensor) and is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a torch function, or of the property that it reads."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
