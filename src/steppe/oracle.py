"""What a rule may ask of the loss; the only code that moves weights during a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.passes import Passes
from steppe.point import Point, Rho, Seen
from steppe.vector import TINY, Vector, copy_, shift_

Closure = Callable[[], Tensor | float]


class NotFinite(Exception):  # noqa: N818
    """A gradient is not finite: the step is to be skipped."""


class Oracle:
    """One batch's loss as a function of the weights, for the length of one step.

    ``g`` is the gradient at ``w``; ``with f.at(eps):`` stands at ``w + eps``, where ``grad`` and ``losses`` answer, and
    puts the weights back bit for bit, in place, also when the closure raises.

    Args:
        closure: zero, forward, backward, return the loss; a :class:`Batch` to look inside the batch.
        point: the parameters and their radii.
        step: how many steps came before, for rules that change with time and pieces that draw random numbers.
        recall: the memory of a parameter by name, from ``optimizer.state``.
        full: the closure over the larger batch of n-SAM.
        keep_g: hold ``g`` until the end of the step, at the cost of one copy of the parameters.
        parallel: whether micro-batches may, must or must not share two passes (``"auto"``, ``True``, ``False``).
        guard: take no pass at weights that are not finite.
        modules: those that a plain closure may run; a batch names its model.
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
        guard: bool = False,
        modules: Callable[[], Iterable[nn.Module]] = tuple,
    ) -> None:
        self.closure, self.point, self.step, self.full = closure, point, step, full
        self.keep_g, self.parallel, self.guard = keep_g, parallel, guard
        self.seen = Seen()
        self._passes = Passes(point, closure.model.modules if isinstance(closure, Batch) else modules)
        self._recall = recall
        self._g: Vector | None = None
        self._full_g: Vector | None = None
        self._whole: Oracle | None = None  # what this one is a part of
        self._losses: Tensor | None = None  # at w; with its graph until a backward or a move
        self._away = False
        self.factors: Any = None  # of the first pass, where a piece has recorded them

    # ---- where we are

    @property
    def w(self) -> Vector:
        """The parameters, live: inside ``at`` they are ``w + eps``."""
        return Vector([p.detach() for p in self.point.parameters])

    @property
    def rho(self) -> Rho:
        """The radius of every parameter: ``f.rho * v`` scales by group."""
        return self.point.rho

    def movable(self, v: Vector) -> Vector:
        """``v`` on the parameters that may move; frozen ones and those with rho 0 take no part in the ascent."""
        return v.where(self.point.movable)

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
        norm = self.seen.numbers["eps_norm"] = eps.norm()
        if self.guard and norm.device.type == "cpu" and not norm.isfinite():
            raise NotFinite  # elsewhere this would be a wait for the device: there eps becomes 0
        moved: list[Tensor] = []
        saved: list[Tensor] = []
        with self.away(), torch.no_grad():
            try:
                for p, e in zip(self.point.parameters, eps.tensors, strict=True):
                    if e is not None:
                        saved.append(p.detach().clone())
                        moved.append(p)
                        shift_(p, e, eps.scale, finite=norm if self.guard else None)
                e = None
                del eps  # no hold on the memory of g
                yield
            finally:
                if moved:
                    copy_(moved, saved[: len(moved)])

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

    def keep(self, g: Vector) -> None:
        """``g``, where a pass of one's own has made it."""
        self._g = g

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
        inputs = None
        if wrt is not None and under is None and isinstance(self.closure, Batch):  # no change that compiled code sees
            inputs, wrt = [p for p, k in zip(self.point.parameters, wrt, strict=True) if k], None
        with self.passing(), self._passes.only(wrt):
            if on is not None:
                self._run_subset(self.batch("a choice of examples"), on)
            elif isinstance(self.closure, Batch) or weights is not None:
                self._run_batch(self.batch("weights on examples"), weights, inputs, under or nullcontext())
            else:
                self._run_closure()
            g = self._passes.take()
        self.seen.any_gradient |= bool(g.present())
        self.seen.norms.append(g.norm())
        self.seen.numbers["g_adv_norm" if self._away else "g_norm"] = g.norm()
        return g

    def losses(self) -> Tensor:
        """Every example's loss here, shape ``(n,)``, detached; at ``w`` the next ``grad`` reuses its graph."""
        if self._away or self._losses is None:
            batch = self.batch("losses")
            with self.passing(), torch.set_grad_enabled(not self._away):
                losses = batch.losses()
            self.seen.count("forwards")
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
            f = Oracle(self.full, self.point, modules=self._passes.modules)
            self._full_g = f.grad()
            self.seen.norms += f.seen.norms
            self.seen.any_gradient |= f.seen.any_gradient
            self.seen.numbers |= {k: v for k, v in f.seen.numbers.items() if k in ("g_norm", "forwards", "backwards")}
            self.seen.numbers["full_loss"] = f.seen.numbers["loss"]
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
        batch = self.batch("micro-batches, m=")
        options = {"full": self.full, "keep_g": self.keep_g, "parallel": self.parallel, "guard": self.guard}
        for closure in batch.split(m):
            f = Oracle(closure, self.point, step=self.step, recall=self._recall, **options)  # type: ignore[arg-type]
            f._whole, f._passes.counted = self, self._passes.counted
            share = len(closure) / len(batch)
            yield share, f
            self.seen.add(share, f.seen)

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

    # ---- telemetry

    def compare(self, g_adv: Vector) -> None:
        """Note the cosine of ``g`` and ``g_adv``, where ``g`` is still held."""
        if self._g is not None:
            product = self._g.norm() * g_adv.norm()
            self.seen.numbers["cosine"] = self._g.dot(g_adv) / (product + TINY)

    def note_parts(self, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
        """Note the norms of every micro-batch, shape ``(k,)``; telemetry has their mean."""
        self.seen.norms.append(g_norms.sum())
        self.seen.numbers["g_norm"] = g_norms @ shares
        self.seen.numbers["eps_norm"] = eps_norms @ shares

    def _see_loss(self, loss: Tensor | float) -> None:
        self.seen.numbers["loss_adv" if self._away else "loss"] = loss

    # ---- passes

    def passing(self) -> AbstractContextManager[None]:
        """Around a pass of one's own."""
        return self._passes.one(self._away)

    def _run_closure(self) -> None:
        loss = self.closure()
        if loss is None:
            raise TypeError("closure must return the loss, got None")
        self._see_loss(loss.detach().clone() if isinstance(loss, Tensor) else loss)  # its memory may be used again
        self.seen.count("forwards")
        self.seen.count("backwards")

    def _run_subset(self, batch: Batch, on: Tensor) -> None:
        chosen = batch.subset(on)
        chosen()
        share = len(chosen) / len(batch)
        self.seen.count("forwards", share)
        self.seen.count("backwards", share)

    def _run_batch(
        self,
        batch: Batch,
        weights: Tensor | None,
        inputs: list[Tensor] | None,
        under: AbstractContextManager[Any],
    ) -> None:
        batch.zero_grad()
        losses = self._losses
        if self._away or losses is None or losses.grad_fn is None:
            with under:
                losses = batch.losses()
            self.seen.count("forwards")
        batch.backward(losses, weights, inputs)
        self.seen.count("backwards")
        losses = losses.detach()
        if not self._away:
            self._losses = losses
        self._see_loss(losses.mean())
