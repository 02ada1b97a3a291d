"""What a rule may ask of the loss; the only code that moves weights during a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches, chunks_of
from steppe.engine.ddp import Ranks
from steppe.engine.grad_scaler import LossScale
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import Passes
from steppe.engine.vector import TINY, Vector, local, shift_
from steppe.telemetry import StepLog

Closure = Callable[[], Tensor | float]


class NotFinite(Exception):  # noqa: N818
    """A gradient is not finite: the step is to be skipped."""


class Oracle:
    """One batch's loss as a function of the weights, for the length of one step.

    ``g`` is the gradient at ``w``; ``with f.at(eps):`` stands at ``w + eps``, where ``grad`` and ``losses`` answer, and
    puts the weights back bit for bit, in place, also when the closure raises.

    Args:
        closure: zero, forward, backward, return the loss; a :class:`Batch` to look inside the batch.
        parameters: the parameters and their radii.
        step: how many steps came before, for rules that change with time and pieces that draw random numbers.
        recall: the memory of a parameter by name, from ``optimizer.state``.
        full: the closure over the larger batch of n-SAM.
        keep_g: hold ``g`` until the end of the step, at the cost of one copy of the parameters.
        parallel: whether micro-batches may, must or must not share two passes (``"auto"``, ``True``, ``False``).
        guard: take no pass at weights that are not finite.
        modules: those that a plain closure may run; a batch names its model.
        ranks: the replicas of the model.
        scale: what the closure's losses are scaled by; gradients taken are unscaled.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Parameters,
        *,
        step: int = 0,
        recall: Callable[[str], Sequence[Tensor | None]] | None = None,
        full: Closure | None = None,
        keep_g: bool = False,
        parallel: bool | str = "auto",
        guard: bool = False,
        modules: Callable[[], Iterable[nn.Module]] = tuple,
        ranks: Ranks | None = None,
        scale: LossScale | None = None,
    ) -> None:
        self.closure, self.parameters, self.step, self.full = closure, parameters, step, full
        self.keep_g, self.parallel, self.guard = keep_g, parallel, guard
        self.ranks, self.scale = ranks or Ranks(), scale
        self.log = StepLog()
        self._passes = Passes(parameters, closure.modules if isinstance(closure, Batch) else modules)
        self._recall = recall
        self._g: Vector | None = None
        self._full_g: Vector | None = None
        self._whole: Oracle | None = None  # what this one is a part of
        self._losses: Tensor | None = None  # at w; with its graph until a backward or a move
        self._away = False
        self.factors: Any = None  # of the first pass, where a piece has recorded them
        self.entries: dict[int, tuple[Batch, Any]] = {}  # what is known of the batches' models

    # ---- where we are

    @property
    def w(self) -> Vector:
        """The parameters, live: inside ``at`` they are ``w + eps``."""
        return Vector([p.detach() for p in self.parameters.tensors])

    @property
    def rho(self) -> Radii:
        """The radius of every parameter: ``f.rho * v`` scales by group."""
        return self.parameters.rho

    def movable(self, v: Vector) -> Vector:
        """``v`` on the parameters that may move; frozen ones and those with rho 0 take no part in the ascent."""
        return v.where(self.parameters.movable)

    @contextmanager
    def at(self, eps: Vector, keep_g: bool = True, know_losses: bool = False) -> Iterator[None]:
        """Stand at ``w + eps``.

        Args:
            eps: where to; ``None`` entries stay.
            keep_g: without it ``g`` is let go of first, so that its memory serves the next pass.
            know_losses: make sure that ``losses_at_w`` has an answer; a forward if no pass at ``w`` came before.
        """
        if know_losses:
            self.losses()
        if not (keep_g or self.keep_g):
            self._g = None
        if self._losses is not None:
            self._losses = self._losses.detach()  # its graph holds weights that are about to move
        norm = self.log.numbers["eps_norm"] = eps.norm()
        wait = norm.device.type == "cpu" and self.ranks.alone  # else eps becomes 0, on its device and on this rank
        if self.guard and wait and not norm.isfinite():
            raise NotFinite
        finite = norm if self.guard and not wait else None
        moved: list[Tensor] = []
        saved: list[Tensor] = []
        with self.away():
            try:
                with torch.no_grad():
                    self._passes.forget_unsharded()
                    for p, e in zip(self.parameters.tensors, eps.tensors, strict=True):
                        if e is not None:
                            saved.append(local(p).clone())
                            moved.append(local(p))
                            shift_(moved[-1], local(e), eps.scale, finite)
                    torch.clear_autocast_cache()  # an autocast around the whole step holds casts of w
                e = None
                del eps  # no hold on the memory of g
                yield
            finally:
                if moved:
                    with torch.no_grad():
                        torch._foreach_copy_(moved, saved[: len(moved)])  # one call: no interrupt comes half way
                    torch.clear_autocast_cache()
                    self._passes.forget_unsharded()

    @property
    def is_whole(self) -> bool:
        """Whether this is the batch itself, not a part of it."""
        return self._whole is None

    @contextmanager
    def away(self) -> Iterator[None]:
        """Passes inside are not at ``w``, also where no weights are moved."""
        if self._away:
            raise RuntimeError("the weights are away from w already: leave one at() before entering the next")
        self._away = True
        try:
            yield
        finally:
            self._away = False

    # ---- what we see there

    @property
    def g(self) -> Vector:
        """The gradient of the mean loss at ``w``; the pass runs once a step."""
        if self._g is None:
            if self._away:
                raise RuntimeError("g is the gradient at w: ask for it before entering at()")
            self._g = self.grad()
        return self._g

    @property
    def shared_g(self) -> Vector:
        """``g``, averaged over the ranks: for rules of one pass, whose update is made of it alone."""
        if self._g is None:
            self._g = self.grad(final=True)
        return self._g

    def rehearse(self) -> None:
        """A pass that counts for nothing but that DDP sees: with a static graph its first one must be averaged."""
        with self.away(), self.passing(), self.ranks.passing(True):
            chunks_of(self.closure)[-1]() if isinstance(self.closure, Batch) else self.closure()
        self._passes.rewind()

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Passes inside count for nothing: those that follow draw the same numbers, and are what the statistics see."""
        with self.ranks.within(), self._passes.one(away=True):
            yield
        self._passes.rewind()

    def given(self) -> Vector:
        """The gradients that a pass of the user's own has left, as ``grad`` would answer."""
        if self.scale is not None:
            self.scale.unscale(self.parameters.tensors)
        return self._noted(self._passes.take())

    def made(self, g: Vector) -> Vector:
        """A gradient at ``w`` made without a backward pass of its own, as ``grad`` would answer: shared and noted."""
        if self.scale is not None:
            self.scale.watch(g.norm())
        return self._noted(self.ranks.shared_gradient(g, self.parameters.tensors))

    def keep(self, g: Vector) -> None:
        """``g``, where a pass of one's own has made it."""
        self._g = g

    def grad(
        self,
        on: Tensor | None = None,
        weights: Tensor | None = None,
        wrt: Sequence[bool] | None = None,
        under: AbstractContextManager[Any] | None = None,
        final: bool = False,
    ) -> Vector:
        """The gradient here: of the mean loss, of the mean over the examples ``on``, or of ``sum_i weights_i f_i``.

        Args:
            on: indices of examples, shape ``(k,)``.
            weights: one weight an example, shape ``(n,)``.
            wrt: which parameters to differentiate by; the others' entries are ``None`` and their backward is saved.
            under: a context for the forward pass of a :class:`Batch`.
            final: the update is this gradient alone, so that DDP may average it over the ranks in its backward pass.
        """
        synced = wrt is None and (self.ranks.shared or (final and self.is_whole))
        left_out, inputs = wrt, None
        if self.parameters.sharded:
            wrt = None
        elif wrt is not None and under is None:
            if isinstance(self.closure, Batch):  # no change that compiled code sees
                inputs, wrt = [p for p, k in zip(self.parameters.tensors, wrt, strict=True) if k], None
            else:  # a loss must hang on some parameter: vectors cost next to nothing
                wrt = [k or p.dim() < 2 for p, k in zip(self.parameters.tensors, wrt, strict=True)]
        with self.passing(), self._passes.only(wrt):
            if isinstance(self.closure, Batch) or on is not None or weights is not None:
                self._run_batch(on, weights, inputs, under or nullcontext(), synced)
            else:
                with self.ranks.passing(synced):
                    self._run_closure()
            if self.scale is not None:
                self.scale.unscale(self.parameters.tensors)
            g = self._passes.take()
        if left_out is not None:
            g = g.where(left_out)
        if synced:
            self.ranks.averaged = True
        elif not final:
            g = self.ranks.shared_gradient(g, self.parameters.tensors)
        return self._noted(g)

    def _noted(self, g: Vector) -> Vector:
        self.log.any_gradient |= bool(g.present())
        self.log.norms += [g.norm()] if g.present() else []  # of nothing it is a number of the host
        self.log.numbers["g_adv_norm" if self._away else "g_norm"] = g.norm()
        return g

    def losses(self) -> Tensor:
        """Every example's loss here, shape ``(n,)``, detached; at ``w`` the next ``grad`` reuses its graph."""
        if self._away or self._losses is None:
            batch = self.batch("losses")
            graph = not self._away and not isinstance(batch, Batches)  # one graph for all would take all their memory
            with self.passing(), torch.set_grad_enabled(graph), self.ranks.passing(graph and self.ranks.shared):
                losses = batch.losses()
            self.log.count("forwards")
            self._see_loss(losses.detach().mean())
            if self._away:
                return losses
            self._losses = losses
        return self._losses.detach()

    def losses_at_w(self) -> Tensor:
        """Every example's loss at ``w``, shape ``(n,)``; inside ``at`` too, if they are known."""
        if self._losses is None and self._away:
            raise RuntimeError("the losses at w are not known here: enter at() with know_losses=True")
        return self.losses() if self._losses is None else self._losses.detach()

    def grad_on_full(self) -> Vector:
        """The gradient at ``w`` of the closure over the larger batch; the pass runs once a step."""
        if self._whole is not None:
            self._full_g = self._whole.grad_on_full()
        if self._full_g is None:
            if self.full is None:
                raise TypeError("this method takes its perturbation from a larger batch: pass full=, a closure over it")
            f = Oracle(self.full, self.parameters, modules=self._passes.modules, ranks=self.ranks, scale=self.scale)
            self._full_g = f.grad()
            self.log.norms += f.log.norms
            self.log.any_gradient |= f.log.any_gradient
            self.log.numbers |= {k: v for k, v in f.log.numbers.items() if k in ("g_norm", "forwards", "backwards")}
            self.log.numbers["full_loss"] = f.log.numbers["loss"]
        self._passes.counted = True  # full's pass at w is the one that normalisation statistics see
        return self._full_g

    # ---- the batch

    def batch(self, use: str = "the batch") -> Batch:
        """The closure as a :class:`Batch`.

        Raises:
            TypeError: it is a plain closure.
        """
        if not isinstance(self.closure, Batch):
            raise TypeError(
                f"this method looks inside the batch ({use}): pass step() a "
                "steppe.Batch(model, loss, data) or steppe.Batch.supervised(...) instead of a plain closure"
            )
        return self.closure

    def split(self, m: int) -> Iterator[tuple[float, Oracle]]:
        """Micro-batches of ``m`` examples, each with its share of the batch. What they see and remember is averaged."""
        yield from self._parts(self.batch("micro-batches, m=").split(m))

    def chunks(self) -> Iterator[tuple[float, Oracle]]:
        """The batches of an accumulated one, like :meth:`split`."""
        yield from self._parts(chunks_of(self.batch()))

    def _parts(self, closures: Sequence[Batch]) -> Iterator[tuple[float, Oracle]]:
        self.ranks.stay_within()
        for closure in closures:
            f = copy(self)
            f.closure, f._whole, f.log = closure, self, StepLog()
            f._passes = Passes(self.parameters, closure.modules)
            f._passes.counted = self._passes.counted
            f._g = f._losses = f.factors = None
            f.entries = {}
            share = len(closure) / len(self.batch())
            yield share, f
            self.log.add(share, f.log)

    # ---- memory from step to step

    def recall(self, name: str, default: Vector) -> Vector:
        """What ``remember`` kept under this name; ``default`` for a parameter that has no memory yet."""
        kept = self._recall(name) if self._recall else [None] * len(self.parameters.tensors)
        if all(t is None for t in kept):
            return default
        missing = default.where(t is None for t in kept).materialised()
        return Vector([d if t is None else t for t, d in zip(kept, missing, strict=True)])

    def remember(self, name: str, v: Vector, rate: float = 1.0) -> None:
        """Keep ``v`` for the next step: in ``optimizer.state``, written once this step has succeeded.

        With a ``rate``, ``m <- m + rate (v - m)`` in the memory that is there; a first ``m`` is ``v``. A parameter
        without an entry keeps its ``m``.
        """
        self.log.memory[name], self.log.rates[name] = v, rate

    # ---- telemetry

    def compare(self, g_adv: Vector) -> None:
        """Note the cosine of ``g`` and ``g_adv``, where ``g`` is still held."""
        if self._g is not None:
            product = self._g.norm() * g_adv.norm()
            self.log.numbers["cosine"] = self._g.dot(g_adv) / (product + TINY)

    def note_parts(self, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
        """Note the norms of every micro-batch, shape ``(k,)``; telemetry has their mean."""
        if self.scale is not None:
            self.scale.watch(g_norms)
        self.log.norms.append(g_norms.sum())
        self.log.numbers["g_norm"] = g_norms @ shares
        self.log.numbers["eps_norm"] = eps_norms @ shares

    def _see_loss(self, loss: Tensor | float) -> None:
        self.log.numbers["loss_adv" if self._away else "loss"] = loss

    # ---- passes

    def passing(self) -> AbstractContextManager[None]:
        """Around a pass of one's own."""
        return self._passes.one(self._away)

    def _run_closure(self) -> None:
        loss = self.closure()
        if loss is None:
            raise TypeError("closure must return the loss, got None")
        self._see_loss(loss.detach().clone() if isinstance(loss, Tensor) else loss)  # its memory may be used again
        self.log.count("forwards")
        self.log.count("backwards")

    def _run_batch(
        self,
        on: Tensor | None,
        weights: Tensor | None,
        inputs: list[Tensor] | None,
        under: AbstractContextManager[Any],
        synced: bool,
    ) -> None:
        whole = self.batch("a choice of examples, or weights on them")
        batch = whole if on is None else whole.subset(on)
        batch.zero_grad()
        chunks = chunks_of(batch)
        ready = None if self._away or on is not None else self._losses
        seen = []
        for k, (chunk, w) in enumerate(zip(chunks, batch.shares(weights), strict=True)):
            with self.ranks.passing(synced and k == len(chunks) - 1):
                losses = ready
                if losses is None or losses.grad_fn is None:
                    with under:
                        losses = chunk.losses()
                    self.log.count("forwards", len(chunk) / len(whole))
                chunk.backward(losses, w, inputs)
            self.log.count("backwards", len(chunk) / len(whole))
            seen.append(losses.detach())
        if on is not None:
            return
        here = seen[0] if len(seen) == 1 else torch.cat(seen)
        if not self._away:
            self._losses = here
        self._see_loss(here.mean())
