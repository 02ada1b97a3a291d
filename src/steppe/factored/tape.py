"""Two passes over the whole batch: one records factors, one evaluates every micro-batch at its own weights.

Both are modes that intercept torch functions, so that every use of a perturbed parameter is seen, whichever module
makes it: what no operation of :mod:`steppe.factored.operations` understands is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

from steppe.factored.held import Pool
from steppe.factored.parts import Layout, Parts
from steppe.factored.terms import Gradient

Matrices = dict[int, list[Any]]  # by parameter: what its uses contribute
Small = dict[int, list[Tensor]]  # by parameter: what its uses contribute, by example, (n, *shape)


class CannotFactor(Exception):  # noqa: N818
    """Why a model's micro-batch gradients cannot be factored."""

    final = True


class Unsure(CannotFactor):
    """Why this batch cannot tell whether they can."""

    final = False


@dataclass
class Site:
    """One use of perturbed parameters in a forward pass.

    ``kept`` is what the operation needs again; ``deltas`` the output's gradients, one a backward; ``leading`` the
    dimensions in which examples lie.
    """

    operation: Any
    weight: int | None
    bias: int | None
    kept: Tensor | None
    leading: tuple[int, ...]
    static: tuple[Any, ...] = ()
    deltas: list[Tensor] = field(default_factory=list)
    layout: Layout | None = None
    version: int = 0
    taken: bool = False  # what it recorded has been used, and is gone

    def let_go(self) -> None:
        """Of what was recorded: its memory serves what follows."""
        self.taken, self.kept = True, None
        self.deltas.clear()

    @property
    def delta(self) -> Tensor:
        """The gradient of the output's rows, by example: ``(n, q, ...)``; zero where it had no part in the loss."""
        assert self.layout is not None
        return self.by_example(self.deltas[0])

    def by_example(self, t: Tensor) -> Tensor:
        """A tensor with this site's leading dimensions as ``(n, q, ...)``."""
        assert self.layout is not None
        return self.layout.by_example(t.reshape(-1, *t.shape[len(self.leading) :]))

    def by_row(self, t: Tensor, leading: Iterable[int]) -> Tensor:
        """The inverse of :meth:`by_example`."""
        assert self.layout is not None
        t = self.layout.by_row(t)
        return t.reshape(*leading, *t.shape[1:])


@dataclass(frozen=True)
class Tracked:
    """The perturbed parameters: which, how they are called, how many examples there are."""

    parameters: Mapping[int, int]  # id -> index
    names: Mapping[int, str]  # index -> name
    n: int
    free: frozenset[int] = frozenset()  # uses, by order, whose rows belong to no example: positions

    def index(self, t: object) -> int | None:
        """The index of a tracked parameter, ``None`` for anything else."""
        return self.parameters.get(id(t)) if isinstance(t, Tensor) else None

    def found(self, args: Iterable[Any]) -> int | None:
        """The first tracked parameter among arguments, also inside lists."""
        for a in args:
            index = self.found(a) if isinstance(a, list | tuple) else self.index(a)
            if index is not None:
                return index
        return None


HARMLESS = {
    *("shape", "dtype", "device", "requires_grad", "ndim", "is_cuda", "is_leaf", "layout", "grad", "is_sparse"),
    *("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size", "get_device"),
    *("is_complex", "data_ptr", "__len__", "is_nested", "is_mkldnn", "is_quantized", "is_meta", "__hash__", "names"),
}  # what may be asked of a parameter without using its value


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


class Tape(TorchFunctionMode):
    """What both passes share: find the operation, refuse what none understands."""

    def __init__(self, tracked: Tracked, operations: Mapping[Any, Any]) -> None:
        super().__init__()
        self.tracked, self.operations = tracked, operations
        self.sites: list[Site] = []
        self.batch_norm = False  # whether whole-batch statistics were used

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self.batch_norm |= bool(args[5] if len(args) > 5 else kwargs.get("training", False))
        operation = self.operations.get(func)
        if operation is not None:
            made = self.handle(operation, func, args, kwargs)
            if made is not NotImplemented:
                return made
        index = self.tracked.found((*args, *kwargs.values()))
        if index is not None and _name(func) not in HARMLESS:
            raise CannotFactor(f"{self.tracked.names[index]} is used by {_name(func)}, which has no factored form")
        return func(*args, **kwargs)

    def handle(self, operation: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's output, or ``NotImplemented`` where it uses no tracked parameter."""
        raise NotImplementedError


class Look(Tape):
    """The first pass: an ordinary forward that records each site's input and, in backward, its output's gradient."""

    def __init__(self, tracked: Tracked, operations: Mapping[Any, Any], pool: Pool | None = None) -> None:
        super().__init__(tracked, operations)
        self.pool = pool
        self.gather: Callable[[Site], None] | None = None  # what is done with a site when backward has come to it
        self.spark: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def handle(self, operation: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's output, watched."""
        return operation.look(self, func, *args, **kwargs)

    def record(self, y: Tensor, site: Site, shape: torch.Size | None = None) -> Tensor:
        """``y``, whose gradient, in ``shape``, the site will have; gradients start here where nothing before needs one.

        What the model sees of ``y`` is to be no view when it comes here: one that is changed in place loses its hook.
        """
        if not torch.is_grad_enabled():
            raise CannotFactor(f"{self.label(site)} is used without gradients")
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise CannotFactor(f"{self.label(site)} runs under activation checkpointing")
        if not y.requires_grad:
            y = y + self.spark.setdefault(
                (y.device, y.dtype), torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
            )
        y.register_hook(lambda grad: self.reach(site, grad.detach().reshape(shape or grad.shape)))
        site.version = 0 if site.kept is None else site.kept._version
        self.sites.append(site)
        return y

    def reach(self, site: Site, delta: Tensor) -> None:
        """Backward has come to a site."""
        site.deltas.append(delta)
        if self.gather is not None and not site.taken:
            self.check_kept(site)
            self.gather(site)

    def uses(self) -> tuple[Any, ...]:
        """What was used in this pass, in order: operation, parameters, leading dimensions."""
        return tuple((site.operation, site.weight, site.bias, site.leading) for site in self.sites)

    def is_free(self) -> bool:
        """Whether the next site's rows belong to no example."""
        return len(self.sites) in self.tracked.free

    def check(self) -> None:
        """Every site has its gradient, and what it kept is unchanged."""
        for site in self.sites:
            if len(site.deltas) + site.taken != 1:
                raise CannotFactor(f"{self.label(site)} has no gradient in this pass, or several")
            self.check_kept(site)

    def check_kept(self, site: Site) -> None:
        """What the site kept is unchanged."""
        if site.kept is not None and site.kept._version != site.version:
            raise CannotFactor(f"the input of {self.label(site)} is changed in place after its use")

    def label(self, site: Site) -> str:
        """The names of a site's parameters."""
        return " and ".join(self.tracked.names[i] for i in (site.weight, site.bias) if i is not None)


class See(Tape):
    """The second pass: at each site, micro-batch ``k`` goes through ``w + eps_k``; gradients flow to ``w``.

    Args:
        tracked: the same as in the first pass.
        operations: likewise.
        sites: what the first pass recorded, in order.
        parts: the micro-batches.
        matrices: by parameter, the gradients of matrices, and the factor that makes ``eps_k`` of each.
        small: by parameter, ``eps_k`` itself, ``(k, *shape)``.
    """

    def __init__(
        self,
        tracked: Tracked,
        operations: Mapping[Any, Any],
        sites: list[Site],
        parts: Parts,
        matrices: Mapping[int, tuple[Gradient, Tensor]],
        small: Mapping[int, Tensor],
    ) -> None:
        super().__init__(tracked, operations)
        self.sites, self.parts, self.matrices, self.small = sites, parts, matrices, small
        self.at = 0

    def handle(self, operation: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's output, each micro-batch at its own weights."""
        return operation.see(self, func, *args, **kwargs)

    def next(self, operation: Any, weight: int | None, bias: int | None) -> Site:
        """The site that the first pass recorded here."""
        site = self.sites[self.at] if self.at < len(self.sites) else None
        if site is None or (site.operation, site.weight, site.bias) != (operation, weight, bias):
            raise CannotFactor("the second forward pass uses other parameters than the first")
        self.at += 1
        return site

    def rows_of(self, site: Site, p: Tensor, index: int, leading: Iterable[int]) -> Tensor:
        """``p + eps_k`` of every row: ``(*leading, *p.shape)``, or broadcast against it."""
        assert site.layout is not None
        eps = self.parts.spread(self.small[index]).to(p.dtype)  # (n, *shape)
        first, *others = leading
        if site.layout == Layout(first, prod(others)):
            return p + eps.reshape(first, *[1] * len(others), *p.shape)
        rows = site.layout.example_of_row(first * prod(others), p.device)
        return p + eps[rows].reshape(first, *others, *p.shape)

    def of_parts(self, p: Tensor, index: int | None) -> Tensor:
        """``p + eps_k`` of every part, without its gradient: ``(k, *p.shape)``."""
        p = p.detach()
        if index is None or index not in self.small:
            return p.expand(self.parts.k, *p.shape)
        return p + self.small[index].to(p.dtype)

    def plus(self, site: Site, y: Tensor, b: Tensor | None) -> Tensor:
        """``y + b``, each micro-batch with its own ``b``; channels last."""
        if b is None or site.bias is None:
            return y if b is None else y + b
        return y + self.rows_of(site, b, site.bias, y.shape[: len(site.leading)])
