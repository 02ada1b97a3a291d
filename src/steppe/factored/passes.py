"""Two passes over the whole batch: the first records factors, the second evaluates each micro-batch at its own weights.

Both are modes that intercept torch functions. So every use of a perturbed parameter is seen, whichever module makes it,
and a use that no layer of :mod:`steppe.factored.layers` understands is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from steppe.engine.vector import wide
from steppe.factored.gradients import Gradient, same_memory
from steppe.factored.microbatches import Layout, MicroBatches, Place, places
from steppe.factored.sites import CannotFactor, Index, Interception, Site, Tracked, Unsure

OTHER_PATH = (
    "the second forward pass uses other parameters than the first: it decides by the data of the whole batch, "
    "or by random numbers that torch has not drawn"
)


class FirstPass(Interception):
    """An ordinary forward pass that records the input of each site and, in backward, the gradient of its output.

    Args:
        tracked: the perturbed parameters.
        layers: torch function -> layer.
        parts: the micro-batches within which examples may influence one another.
        proven: the calls of torch functions that a rehearsal has made.
    """

    def __init__(
        self,
        tracked: Tracked,
        layers: Mapping[Any, Any],
        parts: MicroBatches | None = None,
        proven: Set[Any] = frozenset(),
    ) -> None:
        super().__init__(tracked, layers, parts, proven)
        self.on_delta: Callable[[Site], None] | None = None  # called when backward has reached a site
        self._zeros: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def copies(
        self, layer: Any, of: Sequence[Tensor], index: Index, rows: int, parts: MicroBatches | None = None
    ) -> Tensor:
        """Return copies of the parameters at ``w``, with a hook on their gradient."""
        self.mixes |= self.parts is not None and parts is not None  # the gradients are those of whole micro-batches
        stacked = torch.stack(tuple(of)) if len(of) > 1 else of[0][None]
        copies = stacked.expand(rows, *stacked.shape) + self._zero(stacked)
        return self.watch(copies, Site(layer, *index, None, (rows,), parts=parts))

    def watch(self, y: Tensor, site: Site, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return ``y`` with a hook by which backward stores its gradient, in ``shape``, in the site.

        ``y`` must be no view, because a change in place would drop the hook. Where nothing before ``y`` requires a
        gradient, its graph starts at a zero that does.

        Raises:
            CannotFactor: no graph is recorded here.
        """
        if not torch.is_grad_enabled():
            raise CannotFactor(f"{self.label(site)} is used without gradients, or under checkpoint(use_reentrant=True)")
        if not y.requires_grad:
            y = Started.apply(y, self._zero(y))  # type: ignore[no-untyped-call]
        site.version = 0 if site.kept is None else site.kept._version
        if self.recomputing:
            self._give(site)
        else:
            reshaped = shape is not None and shape != y.shape
            y.register_hook(lambda d: self._store(site, d.detach().reshape(shape) if reshaped else d.detach()))
            if _checkpointed():
                site.kept, site.awaited = None, True
            self.sites.append(site)
        self.count += 1
        return y

    def _zero(self, like: Tensor) -> Tensor:
        """Return a zero that requires a gradient."""
        key = like.device, like.dtype
        if key not in self._zeros:
            self._zeros[key] = torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=True)
        return self._zeros[key]

    def _give(self, site: Site) -> None:
        """Give the site of the forward pass its input, which activation checkpointing has computed again."""
        known = self.sites[self.count] if self.count < len(self.sites) else site
        if known is site or (known.layer, known.weight, known.bias) != (site.layer, site.weight, site.bias):
            raise CannotFactor("activation checkpointing computes something else again")
        if known.awaited:
            known.kept, known.version, known.awaited = site.kept, site.version, False

    @contextmanager
    def again(self, place: tuple[int, int]) -> Iterator[None]:
        """Surround what is computed again, and collect the uses that backward has reached before."""
        with super().again(place):
            yield
            stop = self.count
        for site in self.sites[place[0] : stop]:
            if site.deltas and not site.freed:
                self._reached(site)

    def _store(self, site: Site, delta: Tensor) -> None:
        if self.running:
            raise CannotFactor(f"a gradient is computed inside the forward pass, through {self.label(site)}")
        site.deltas.append(delta)
        if not site.freed and not site.awaited:
            self._reached(site)

    def _reached(self, site: Site) -> None:
        if self.on_delta is not None:
            self.check_kept(site)
            self.on_delta(site)

    def path(self) -> tuple[Any, ...]:
        """Return what the forward pass did with the parameters, whatever the sizes of its data.

        Of every site, in order: the layer, the parameters, in how many dimensions examples lie, and how often the same
        has been before. With it stands whether there is one example, or one micro-batch where its examples influence
        one another: one fits any layout.
        """
        kind = self.tracked.unbatched, self.mixes, self.mixes and self.independent == 1, self.tracked.n == 1
        before: Counter[Any] = Counter()
        made = []
        for site in self.sites:
            use = site.layer, site.weight, site.bias, len(site.leading)
            made.append((*use, before[use], kind))
            before[use] += 1
        return tuple(made)

    @property
    def independent(self) -> int:
        """How many examples, or micro-batches, do not influence one another."""
        return self.parts.k if self.parts is not None and self.mixes else self.tracked.n

    def place(self, site: Site, weights: Tensor) -> Place | None:
        """Return where examples lie, if the second of two backwards is the first times their weights.

        Raises:
            Unsure: there is no gradient to tell, or it fits two places.
        """
        if len(site.deltas) != 2:
            raise CannotFactor(f"{self.label(site)} has no gradient in this pass, or several")
        a, b = (wide(d.reshape(prod(site.leading), -1)) for d in site.deltas)
        if site.parts is not None and not a.any() and not b.any():
            return Place(0)  # of copies it is known
        if not a.norm() > 0 or not a.isfinite().all():
            raise Unsure(f"the gradient at {self.label(site)} is zero or not finite for this batch")
        low = any(wide(d) is not d for d in site.deltas)
        weights = weights if site.parts is None else weights[site.parts.starts]
        found = []
        for layout, place in places(len(weights), site.leading).items():
            w = wide(weights)[layout.example_of_row(len(a), a.device), None]
            if (b - w * a).norm() < (0.3 if low else 1e-2) * b.norm():
                found.append(place)
        if len(found) > 1 and self.independent > 1:
            raise Unsure(f"examples may lie in two ways at {self.label(site)}, and this batch fits both")
        return found[0] if found else None

    def check(self) -> None:
        """Raise where a site has no gradient, or several, or its input was changed in place."""
        for site in self.sites:
            if len(site.deltas) + site.freed != 1:
                raise CannotFactor(f"{self.label(site)} has no gradient in this pass, or several")
            if site.awaited:
                raise CannotFactor(f"activation checkpointing does not compute the input of {self.label(site)} again")
            self.check_kept(site)

    def check_kept(self, site: Site) -> None:
        """Raise where the input of the site was changed in place."""
        if site.kept is not None and site.kept._version != site.version:
            raise CannotFactor(f"the input of {self.label(site)} is changed in place after its use")

    def label(self, site: Site) -> str:
        """Return the names of the site's parameters."""
        return " and ".join(self.tracked.names[i] for i in (site.weight, site.bias) if i is not None)


class Started(torch.autograd.Function):
    """``y + zero`` in the memory of ``y``: a copy of a first activation took 3 % of a step of a CNN."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, zero: Tensor) -> Tensor:
        """Return ``y``, as no view of it."""
        return same_memory(y)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[None, None]:
        """Return no gradients: nothing asks for that of the zero."""
        return None, None


def _checkpointed() -> bool:
    """Return whether activation checkpointing will compute again what is computed here."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


class SecondPass(Interception):
    """A forward pass in which micro-batch ``k`` goes through ``w + eps_k``; gradients flow to ``w``.

    Args:
        first: the first pass, whose sites are used again, in order.
        parts: the micro-batches.
        matrices: by parameter, the gradients ``G_k`` of a matrix, and ``s_k``, shape ``(k,)``: ``eps_k = s_k G_k``.
        small: by parameter, ``eps_k`` itself, ``(k, *shape)``.
    """

    parts: MicroBatches

    def __init__(
        self,
        first: FirstPass,
        parts: MicroBatches,
        matrices: Mapping[int, tuple[Gradient, Tensor]],
        small: Mapping[int, Tensor],
    ) -> None:
        super().__init__(first.tracked, first.layers, parts, first.proven)
        self.sites, self.matrices, self.small = first.sites, matrices, small

    def next(self, layer: Any, weight: int | None, bias: int | None) -> Site:
        """Return the site that the first pass recorded here."""
        site = self.sites[self.count] if self.count < len(self.sites) else None
        if site is None or (site.layer, site.weight, site.bias) != (layer, weight, bias):
            raise Unsure(OTHER_PATH)
        self.count += 1
        return site

    def check(self) -> None:
        """Raise where parameters of the first pass have not been used."""
        if self.count < len(self.sites):
            raise Unsure(OTHER_PATH)

    def copies(
        self, layer: Any, of: Sequence[Tensor], index: Index, rows: int, parts: MicroBatches | None = None
    ) -> Tensor:
        """Return ``p + eps_k`` of the parameters."""
        site = self.next(layer, *index)

        def own(p: Tensor, i: int | None) -> Tensor:
            if i is None:
                return p.expand(rows, *p.shape)
            return p + self.small[i].to(p.dtype) if parts is not None else self.rows_of(site, p, i, (rows,))

        copies = [own(p, i) for p, i in zip(of, index, strict=False)]
        return torch.stack(copies, 1) if len(copies) > 1 else copies[0][:, None]

    def rows_of(self, site: Site, p: Tensor, index: int, leading: Iterable[int]) -> Tensor:
        """Return ``p + eps_k`` for every row: ``(*leading, *p.shape)``, or broadcast against it."""
        assert site.layout is not None
        eps = self.parts.spread(self.small[index]).to(p.dtype)  # (n, *shape)
        first, *others = leading
        if site.layout == Layout(first, prod(others)):
            return p + eps.reshape(first, *[1] * len(others), *p.shape)
        rows = site.layout.example_of_row(first * prod(others), p.device)
        return p + eps[rows].reshape(first, *others, *p.shape)
