"""What a rule may ask of the loss; the only code that moves weights during a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from steppe.batch import Batch
from steppe.point import Point, Seen
from steppe.replay import RandomState, frozen_statistics
from steppe.vector import TINY, Vector, shift_

Closure = Callable[[], Tensor | float]


class Oracle:
    """One batch's loss as a function of the weights, for the length of one step.

    ``g`` is the gradient at ``w``; ``with f.at(eps):`` stands at ``w + eps``, where ``grad`` and ``losses`` answer, and
    puts the weights back bit for bit, in place, also when the closure raises. The first pass at ``w`` is an ordinary
    one; every other pass draws the same random numbers and leaves normalisation statistics as they were.

    Args:
        closure: zero, forward, backward, return the loss; a :class:`Batch` to look inside the batch.
        point: the parameters and their radii.
        step: how many steps came before, for rules that change with time and pieces that draw random numbers.
        recall: the memory of a parameter by name, from ``optimizer.state``.
        full: the closure over the larger batch of n-SAM.
        keep_g: hold ``g`` until the end of the step, at the cost of one copy of the parameters.
        parallel: whether micro-batches may, must or must not share two passes (``"auto"``, ``True``, ``False``).
    """

    def __init__(
        self,
        closure: Closure,
        point: Point,
        *,
        step: int = 0,
        recall: Callable[[str], Sequence[Tensor | None]] | None = None,
        full: Closure | None = None,
        keep_g: bool = False,
        parallel: bool | str = "auto",
    ) -> None:
        self.closure, self.point, self.step, self.full = closure, point, step, full
        self.rho, self.names = point.rho, point.names
        self.keep_g, self.parallel = keep_g, parallel
        self.seen = Seen()
        self._recall = recall
        self._g: Vector | None = None
        self._full_g: Vector | None = None
        self._whole: Oracle | None = None  # what this one is a part of
        self._losses: Tensor | None = None  # at w; with its graph until a backward or a move
        self._moved = self._counted = False
        self._random: tuple[RandomState, RandomState] | None = None  # before and after the first pass

    # ---- where we are

    @property
    def w(self) -> Vector:
        """The parameters, live: inside ``at`` they are ``w + eps``."""
        return Vector([p.detach() for p in self.point.parameters])

    @contextmanager
    def at(self, eps: Vector, keep_g: bool = True, know_losses: bool = False) -> Iterator[None]:
        """Stand at ``w + eps``.

        Args:
            eps: where to; ``None`` entries stay.
            keep_g: without it ``g`` is let go of first, so that its memory serves the next pass.
            know_losses: make sure that ``losses_at_w`` has an answer; a forward if no pass at ``w`` came before.
        """
        if self._moved:
            raise RuntimeError("the weights are away from w already: leave one at() before entering the next")
        if know_losses:
            self.losses()
        if not (keep_g or self.keep_g):
            self._g = None
        if self._losses is not None:
            self._losses = self._losses.detach()  # its graph holds weights that are about to move
        self.seen.numbers["eps_norm"] = eps.norm()
        saved: list[tuple[Tensor, Tensor]] = []
        self._moved = True
        try:
            with torch.no_grad():
                for p, e in zip(self.point.parameters, eps.tensors, strict=True):
                    if e is not None:
                        saved.append((p, p.clone()))
                        shift_(p, e, eps.scale)
                e = None
            del eps
            yield
        finally:
            with torch.no_grad():
                for p, copy in saved:
                    p.copy_(copy)
            self._moved = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """Passes inside are not at ``w``, by other means than moving the weights."""
        if self._moved:
            raise RuntimeError("the weights are away from w already")
        self._moved = True
        try:
            yield
        finally:
            self._moved = False

    def movable(self, v: Vector) -> Vector:
        """``v`` on the parameters whose rho is above 0: the others take no part in the ascent."""
        return v.where(self.rho.values)

    # ---- what we see there

    @property
    def g(self) -> Vector:
        """The gradient of the mean loss at ``w``; the pass runs once a step."""
        if self._g is None:
            if self._moved:
                raise RuntimeError("g is the gradient at w: ask for it before entering at()")
            self._g = self.grad()
        return self._g

    def grad(
        self,
        on: Tensor | None = None,
        weights: Tensor | None = None,
        wrt: Sequence[bool] | None = None,
        under: AbstractContextManager[Any] | None = None,
    ) -> Vector:
        """The gradient here: of the mean loss, of the mean over the examples ``on``, or of ``sum_i weights_i f_i``.

        Args:
            on: indices of examples, shape ``(k,)``.
            weights: one weight an example, shape ``(n,)``.
            wrt: which parameters to differentiate by; the others' entries are ``None`` and their backward is saved.
            under: a context for the forward pass of a :class:`Batch`.
        """
        with self.passing(), self._only(wrt):
            if on is not None:
                self._run_subset(self.batch("a choice of examples"), on)
            elif isinstance(self.closure, Batch) or weights is not None:
                self._run_batch(self.batch("weights on examples"), weights, under or nullcontext())
            else:
                self._run_closure()
            g = Vector([self._take(p) for p in self.point.parameters])
        self.seen.any_gradient |= bool(g.present())
        self.seen.norms.append(g.norm())
        self.seen.numbers["g_adv_norm" if self._moved else "g_norm"] = g.norm()
        return g

    def losses(self) -> Tensor:
        """Every example's loss here, shape ``(n,)``, detached; at ``w`` the next ``grad`` reuses its graph."""
        if self._moved or self._losses is None:
            batch = self.batch("losses")
            with self.passing(), torch.set_grad_enabled(not self._moved):
                losses = batch.losses()
            self.seen.count("forwards")
            self._see_loss(losses.detach().mean())
            if self._moved:
                return losses
            self._losses = losses
        return self._losses.detach()

    def losses_at_w(self) -> Tensor:
        """Every example's loss at ``w``, shape ``(n,)``; inside ``at`` too, if they are known."""
        if self._losses is None and self._moved:
            raise RuntimeError("the losses at w are not known here: enter at() with know_losses=True")
        return self.losses() if self._losses is None else self._losses.detach()

    def grad_on_full(self) -> Vector:
        """The gradient at ``w`` of the closure over the larger batch; the pass runs once a step."""
        if self._whole is not None:
            self._full_g = self._whole.grad_on_full()
            self._counted = True
        if self._full_g is None:
            if self.full is None:
                raise TypeError("this method takes its perturbation from a larger batch: pass full=, a closure over it")
            f = Oracle(self.full, self.point)
            self._full_g = f.grad()
            self._counted = True  # full's pass at w is the one that normalisation statistics see
            self.seen.norms += f.seen.norms
            self.seen.any_gradient |= f.seen.any_gradient
            self.seen.numbers |= {k: v for k, v in f.seen.numbers.items() if k in ("g_norm", "forwards", "backwards")}
            self.seen.numbers["full_loss"] = f.seen.numbers["loss"]
        return self._full_g

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
        batch = self.batch("micro-batches, m=")
        for closure in batch.split(m):
            f = Oracle(
                closure,
                self.point,
                step=self.step,
                recall=self._recall,
                full=self.full,
                keep_g=self.keep_g,
                parallel=self.parallel,
            )
            f._whole = self
            share = len(closure) / len(batch)
            yield share, f
            self.seen.add(share, f.seen)

    def keep(self, g: Vector) -> None:
        """``g``, where a pass of one's own has made it."""
        self._g = g

    def note_parts(self, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
        """Note the norms of every micro-batch, shape ``(k,)``; telemetry has their mean."""
        self.seen.norms.append(g_norms.sum())
        self.seen.numbers["g_norm"] = g_norms @ shares
        self.seen.numbers["eps_norm"] = eps_norms @ shares

    def compare(self, g_adv: Vector) -> None:
        """Note the cosine of ``g`` and ``g_adv``, where ``g`` is still held."""
        if self._g is not None:
            product = self._g.norm() * g_adv.norm()
            self.seen.numbers["cosine"] = self._g.dot(g_adv) / (product + TINY)

    # ---- memory from step to step

    def recall(self, name: str, default: Vector) -> Vector:
        """What ``remember`` kept under this name; ``default`` for a parameter that has no memory yet."""
        kept = self._recall(name) if self._recall else [None] * len(self.point.parameters)
        if all(t is None for t in kept):
            return default
        fill = default.materialised()
        return Vector([d if t is None else t for t, d in zip(kept, fill, strict=True)])

    def remember(self, name: str, v: Vector) -> None:
        """Keep ``v`` for the next step: in ``optimizer.state``, written once this step has succeeded."""
        self.seen.memory[name] = v

    # ---- passes

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass: replay the random stream, freeze the statistics but for the first pass at ``w``, drop gradients."""
        for p in self.point.parameters:
            p.grad = None
        devices = self.point.devices()
        start, end = self._random or (RandomState.now(devices), None)
        if self._random:
            start.restore()
        try:
            if self._counted or self._moved:
                modules = self.closure.model.modules() if isinstance(self.closure, Batch) else None
                with frozen_statistics(modules), torch.enable_grad():
                    yield
            else:
                with torch.enable_grad():
                    yield
                self._counted = True
        finally:
            for p in self.point.parameters:
                p.grad = None
            if end is not None:
                end.restore()  # the stream goes on as after one ordinary pass
        self._random = (start, end or RandomState.now(devices))

    def _run_closure(self) -> None:
        loss = self.closure()
        if loss is None:
            raise TypeError("closure must return the loss, got None")
        self._see_loss(loss.detach() if isinstance(loss, Tensor) else loss)
        self.seen.count("forwards")
        self.seen.count("backwards")

    def _run_subset(self, batch: Batch, on: Tensor) -> None:
        chosen = batch.subset(on)
        chosen()
        share = len(chosen) / len(batch)
        self.seen.count("forwards", share)
        self.seen.count("backwards", share)

    def _run_batch(self, batch: Batch, weights: Tensor | None, under: AbstractContextManager[Any]) -> None:
        batch.zero_grad()
        losses = self._losses
        if self._moved or losses is None or losses.grad_fn is None:
            with under:
                losses = batch.losses()
            self.seen.count("forwards")
        batch.backward(losses, weights)
        self.seen.count("backwards")
        losses = losses.detach()
        if not self._moved:
            self._losses = losses
        self._see_loss(losses.mean())

    def _see_loss(self, loss: Tensor | float) -> None:
        self.seen.numbers["loss_adv" if self._moved else "loss"] = loss

    @contextmanager
    def _only(self, wrt: Sequence[bool] | None) -> Iterator[None]:
        left_out = [] if wrt is None else [p for p, k in zip(self.point.parameters, wrt, strict=True) if not k]
        left_out = [p for p in left_out if p.requires_grad]
        for p in left_out:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in left_out:
                p.requires_grad_(True)

    @staticmethod
    def _take(p: Tensor) -> Tensor | None:
        """The gradient, out of reach of the next pass."""
        g, p.grad = p.grad, None
        if g is None:
            return None
        if g.is_sparse:
            raise TypeError("steppe needs dense gradients, got a sparse one: use nn.Embedding(sparse=False)")
        shared = g.untyped_storage().nbytes() != g.numel() * g.element_size()  # a view of a bucket, as under DDP
        return g.detach().clone() if shared else g.detach()
