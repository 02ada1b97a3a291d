"""The forward and backward passes of one step: all of them but those that verify a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches, chunks_of
from steppe.engine.checks import loss_among
from steppe.engine.ddp import Ranks, distributed_run, no_unknown_replica
from steppe.engine.grad_scaler import LossScale
from steppe.engine.grads import drop, only, take
from steppe.engine.parameters import Parameters
from steppe.engine.replay import RandomState, frozen_statistics
from steppe.engine.vector import Vector
from steppe.telemetry import StepLog

Closure = Callable[[], Tensor | float]
PARTS = "parts of it, m= or ascent="  # a use of the batch


class Passes:
    """The passes of one step over one batch.

    The first pass at ``w`` is an ordinary one; where the batch has none at ``w``, the first at ``w + eps`` is. Every
    other pass draws the same numbers from torch's generators (those of Python and NumPy advance) and leaves running
    statistics as they were.

    Args:
        closure: zero, forward, backward, return the loss; or a :class:`~steppe.Batch`.
        parameters: the parameters and their radii.
        modules: those that a plain closure may run; a batch names its model.
        ranks: the replicas of the model under DDP.
        scale: the scale of the closure's losses; gradients are unscaled when they are taken.
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Parameters,
        modules: Callable[[], Iterable[nn.Module]] = tuple,
        ranks: Ranks | None = None,
        scale: LossScale | None = None,
    ) -> None:
        self.closure, self.parameters, self.scale = closure, parameters, scale
        self.ranks = ranks or Ranks()
        self.modules = closure.modules if isinstance(closure, Batch) else modules
        self.log = StepLog()
        self.away = False  # whether passes are at w + eps
        self.counted = False  # whether the running statistics have seen the batch
        self.first_is_away = False  # whether they are to see the first pass at w + eps, as none is at w
        self._losses: Tensor | None = None  # at w; with its graph until a backward or a move
        self._random: tuple[RandomState, RandomState] | None = None  # before and after the first pass

    @property
    def context(self) -> tuple[Parameters, Callable[[], Iterable[nn.Module]], Ranks, LossScale | None]:
        """Arguments of passes over another batch in the same step."""
        return self.parameters, self.modules, self.ranks, self.scale

    def of(self, batch: Batch) -> Passes:
        """Return the passes over a part of the batch, in the same place."""
        part = Passes(batch, *self.context)
        part.away, part.counted, part.first_is_away = self.away, self.counted, self.first_is_away
        return part

    def batch(self, use: str) -> Batch:
        """Return the closure as a :class:`~steppe.Batch`.

        Raises:
            TypeError: it is a plain closure.
        """
        if not isinstance(self.closure, Batch):
            raise TypeError(
                f"this method looks inside the batch ({use}): pass step() a "
                "steppe.Batch(model, loss, data) or steppe.Batch.supervised(...) instead of a plain closure"
                + (", or a steppe.MeanBatch(model, loss, data) if the loss is one mean" if use == PARTS else "")
            )
        return self.closure

    def weighed(self, parts: Sequence[Batch]) -> list[tuple[Batch, float]]:
        """Return the parts of a batch, each with its share of the weight.

        Gradients of sharded parameters are means over all ranks. There a part is that of all ranks, ``sum_r s_r L_r /
        sum_r s_r``, its share the mean of the ``s_r``: no rank leaves out by itself a pass that gathers parameters.
        """
        total = self.batch(PARTS).weight or 1.0
        shares = [part.weight / total for part in parts]
        if self.batch(PARTS).per_example or not self.parameters.sharded:
            return list(zip(parts, shares, strict=True))
        mine = torch.tensor(shares, dtype=torch.float64, device=self.parameters.device)
        known = zip(parts, shares, self.ranks.shared_mean(mine, sharded=True).tolist(), strict=True)
        return [(part.times(own / (mean or 1.0)), mean) for part, own, mean in known]  # type: ignore[attr-defined]

    # ---- around a pass

    @contextmanager
    def one(self, away: bool | None = None) -> Iterator[None]:
        """Surround one forward and backward, at ``w`` or away from it. Gradients are dropped before and after."""
        drop(self.parameters.tensors)
        torch.clear_autocast_cache()  # weights may have moved, or a forward without gradients have cast them
        devices = self.parameters.devices
        start, end = self._random or (RandomState.now(devices), None)
        if end is not None:
            start.restore()
        try:
            if self.counted or (away if away is not None else self.away and not self.first_is_away):
                with frozen_statistics(self.modules()), torch.enable_grad():
                    yield
            else:
                check = self.ranks.alone and not self.parameters.sharded and distributed_run()
                with torch.enable_grad(), no_unknown_replica(self.modules()) if check else nullcontext():
                    yield
                self.counted = True
        finally:
            drop(self.parameters.tensors)
            if end is not None:
                end.restore()  # the stream goes on as after one ordinary pass
        self._random = (start, end or RandomState.now(devices))

    @contextmanager
    def away_from_w(self) -> Iterator[None]:
        """Declare passes inside to be away from ``w``, also where no weights are moved."""
        if self.away:
            raise RuntimeError("the weights are away from w already: leave one at() before entering the next")
        self.away = True
        try:
            yield
        finally:
            self.away = False

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Run passes inside over the same examples with another loss."""
        before, self.closure = self.closure, batch
        try:
            yield
        finally:
            self.closure = before

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Surround passes that count for nothing: later ones draw the same numbers and update running statistics."""
        with self.ranks.within(), self.one(away=True):
            yield
        self.rewind()

    def prepare_static_graph(self) -> None:
        """Run one throw-away pass so that DDP can build its static graph, in a pass that it averages."""
        with self.away_from_w(), self.one(), self.ranks.passing(True):
            chunks_of(self.closure)[-1]() if isinstance(self.closure, Batch) else self.closure()
        self.rewind()

    def rewind(self) -> None:
        """Forget the passes so far: restore the random state before the first one."""
        if self._random is not None:
            self._random[0].restore()
            self._random = None

    def reshard(self) -> None:
        """Free whole parameters that ``fully_shard`` has gathered: the next pass is at other weights."""
        if self.parameters.sharded:
            reshard(self.modules())

    # ---- gradients

    def gradient(
        self,
        on: Tensor | None = None,
        weights: Tensor | None = None,
        wrt: Sequence[bool] | None = None,
        under: AbstractContextManager[Any] | None = None,
        final: bool = False,
    ) -> Vector:
        """Return the gradient here, by one forward and backward, as the ranks share it.

        Args:
            on, weights, wrt: as for :meth:`steppe.Oracle.grad`.
            under: a context for the forward pass of a :class:`~steppe.Batch`.
            final: the update is made of this gradient alone, so DDP may average it in its backward pass.
        """
        reused = (
            under is None and on is None and not self.away and self._losses is not None and self._losses.requires_grad
        )
        final = final and wrt is None and not reused  # DDP averages what its own forward, in this pass, has prepared
        synced = wrt is None and (self.ranks.shared or final)
        left_out, inputs = wrt, None
        if self.parameters.sharded:
            wrt = None
        elif wrt is not None and under is None:
            if isinstance(self.closure, Batch):  # no change that compiled code sees
                inputs, wrt = [p for p, k in zip(self.parameters.tensors, wrt, strict=True) if k], None
            else:  # a loss must depend on some parameter: vectors cost next to nothing
                wrt = [k or p.dim() < 2 for p, k in zip(self.parameters.tensors, wrt, strict=True)]
        with self.one(), only(self.parameters.tensors, wrt):
            if isinstance(self.closure, Batch) or on is not None or weights is not None:
                self._run_batch(on, weights, inputs, under or nullcontext(), synced, reused)
            else:
                with self.ranks.passing(synced):
                    self._run_closure()
            if self.scale is not None:
                self.scale.unscale(self.parameters.tensors)
            g = take(self.parameters.tensors)
        if left_out is not None:
            g = g.where(left_out)
        if synced:
            self.ranks.averaged = True
        elif not final:
            g = self.ranks.shared_gradient(g, self.parameters.tensors)
        return self._noted(g)

    def given(self) -> Vector:
        """Return the gradients that a pass of the user has left in ``p.grad``, unscaled."""
        if self.scale is not None:
            self.scale.unscale(self.parameters.tensors)
        return self._noted(take(self.parameters.tensors))

    def made(self, g: Vector) -> Vector:
        """Register a gradient that was computed without a backward pass: share it among the ranks, log its norm."""
        if self.scale is not None:
            self.scale.watch(g.norm())
        return self._noted(self.ranks.shared_gradient(g, self.parameters.tensors))

    def losses(self) -> Tensor:
        """Return every example's loss here, shape ``(n,)``, detached; at ``w`` the next gradient reuses its graph."""
        if not self.away and self._losses is not None:
            return self._losses.detach()
        batch = self.batch("losses")
        graph = not self.away and not isinstance(batch, Batches)  # one graph for all would take all their memory
        with self.one(), torch.set_grad_enabled(graph), self.ranks.passing(graph and self.ranks.shared):
            losses = batch.losses()
        self.log.count("forwards")
        self._see_loss(losses.detach().mean())
        if not self.away:
            self._losses = losses
        return losses.detach()

    def losses_at_w(self) -> Tensor | None:
        """Return the losses of the last pass at ``w``, detached; ``None`` where there was none."""
        return None if self._losses is None else self._losses.detach()

    def detach_losses(self) -> None:
        """Free the graph of the losses at ``w``, which holds weights that are about to move."""
        self._losses = self.losses_at_w()

    def _run_closure(self) -> None:
        loss = loss_among(self.closure())
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
        reused: bool,
    ) -> None:
        whole = self.batch("a choice of examples, or weights on them")
        batch = whole if on is None else whole.subset(on)
        batch.zero_grad()
        rounds = batch.rounds
        ready = self._losses if reused else None
        seen = []
        for k, (chunk, w) in enumerate(zip(rounds, batch.shares(weights), strict=True)):
            with self.ranks.passing(synced and k == len(rounds) - 1):
                if ready is None:
                    seen.append(chunk.run(w, inputs, under))
                    self.log.count("forwards", len(chunk) / len(whole))
                else:
                    chunk.backward(ready, w, inputs)
                    seen.append(ready.detach())
            self.log.count("backwards", len(chunk) / len(whole))
        if on is not None:
            return
        if batch.per_example and not self.away:
            self._losses = seen[0] if len(seen) == 1 else torch.cat(seen)
        self._see_loss(batch.mean_of(seen))

    def _see_loss(self, loss: Tensor | float) -> None:
        self.log.numbers["loss_adv" if self.away else "loss"] = loss

    def _noted(self, g: Vector) -> Vector:
        self.log.any_gradient |= bool(g.present())
        self.log.norms += [g.norm()] if g.present() else []  # of nothing it is a number of the host
        self.log.numbers["g_adv_norm" if self.away else "g_norm"] = g.norm()
        return g


def reshard(modules: Iterable[nn.Module]) -> None:
    """Free the whole parameters that a forward without a backward has left in modules under ``fully_shard``."""
    for module in modules:
        free = getattr(module, "reshard", None)
        if callable(free):
            free()
