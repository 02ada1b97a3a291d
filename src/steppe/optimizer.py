"""The ``torch.optim.Optimizer`` around a base optimizer and a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from steppe.batch import Batch, as_closure
from steppe.engine import checks
from steppe.engine.ddp import RankGroups, Sync
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.parameters import RadiusOfGroups, steps_of
from steppe.engine.passes import Closure
from steppe.facade import Facade
from steppe.joint import as_one
from steppe.options import Base
from steppe.rule import on_micro_batches
from steppe.schedule import Schedule
from steppe.step import Pending, Skipped, Stepper
from steppe.telemetry import Telemetry

Scaler = torch.amp.GradScaler
KEPT = {"telemetry", "_stepper", "_warned"}  # by copies; schedulers patch ``step``


class SharpnessAware(Facade):
    """Any base optimizer, made sharpness-aware by a rule.

    ``param_groups``, ``state``, ``defaults`` and ``state_dict`` are the base's. Each group has a ``rho``
    (``sharpness_rho`` where the base has an option ``rho`` of its own, as Adadelta): its own where the base's group was
    given one (0 keeps the group out of the ascent), else the optimizer's. The rule's memory lives in ``state[p]``
    beside the base's, or apart from it where the base saves in a way of its own; one checkpoint resumes both, bit for
    bit. Keep parameters in float32: bfloat16 rounds most of a small perturbation away
    (``docs/stacks/mixed-precision.md``).

    Args:
        base: an optimizer instance; it takes one step on the update's ``grad``. A list of them is their
            :class:`~steppe.Joint`.
        rule: ``(Oracle) -> Update``, for example :class:`~steppe.Rule`.
        rho: radius of the perturbation, in the units of the rule's geometry, or a schedule (:mod:`steppe.schedule`).
        full: closure over the larger batch of n-SAM (:class:`~steppe.OnFull`).
        m: size of the micro-batches that each get their own perturbation (m-SAM, :class:`~steppe.Micro`); ``step`` then
            needs a :class:`~steppe.Batch`. ``None`` is the whole batch.
        sampled: how many random micro-batches are taken at every step, for m-SAM in expectation at
            ``1 + sampled m / n`` passes, or ``1 + 2 sampled m / n`` where examples are mixed (:class:`~steppe.Micro`);
            needs ``m``. ``None`` takes all of them.
        ascent: take the perturbation from this many random examples of a :class:`~steppe.Batch`, for ``1 + ascent / n``
            passes (:class:`~steppe.Subset` tells by how much to raise rho). The loss that ``step`` returns is theirs.
        clip: the largest norm of the correction of ``sampled``, in units of ``norm(g)``; ``None`` is any.
        check_finite: skip steps whose gradients are not finite, or of a norm whose square is not, 1.8e19 in float32.
            The step then waits for its device once; else only for all-reduces, verification of shared passes, numbers
            that AESAM decides by or a rule remembers, ESAM on accumulated batches, weights of a
            :class:`~steppe.MeanBatch`, and at every 50th step for what is told once of a run.
        cosine: keep ``g`` for ``telemetry.cosine``, at the cost of one copy of the parameters.
        gradient_noise: measure ``telemetry.trace_V`` before every step, at the cost of a pass; needs a
            :class:`~steppe.Batch` and a model that factors (:func:`~steppe.factored.gradient_statistics`).
        parallel: run micro-batches in two shared passes over the whole batch (:mod:`steppe.factored`): ``"auto"`` where
            the model allows it and it is cheaper, ``True`` always, or an error, ``False`` never.
        sync: whose gradients make the perturbation under ``DistributedDataParallel``: ``"local"`` (each rank its own:
            m-SAM across ranks, as published; what ``"auto"`` means), ``"global"`` (all ranks share one,
            and every pass is averaged), or a number of neighbouring ranks that share one. The gradient that the base
            sees is averaged over all ranks in each case. With sharded parameters (``fully_shard``) all ranks share one.
        max_norm: clip the gradient that the base sees to this norm over all parameters, once a step, and WSAM's term
            by the same factor (:meth:`~steppe.Update.clipped`).
        model: the module that plain closures run, where steppe cannot find it among the variables that the closure
            refers to. Its running statistics are protected in further passes, and DDP
            is told when to average.

    Raises:
        TypeError: ``base`` is no optimizer instance, one of another kind (L-BFGS, SparseAdam), or keeps nothing of what
            the rule reads of its state; complex parameters.
        ValueError: ``rho`` is negative, ``base`` is wrapped already, a group maximises or is differentiable, or
            ``parallel``, ``sync`` or ``max_norm`` is none of the above.

    Example:
        >>> base = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> optimizer = SharpnessAware(base, Rule(geometry=Adaptive(), combine=Weighted(0.9)), rho=0.5)
        >>> loss = optimizer.step(Batch.supervised(model, criterion, inputs, targets))
    """

    telemetry: Telemetry  #: what the last step saw

    def __init__(
        self,
        base: Base,
        rule: AnyRule,
        rho: float | Schedule = 0.05,
        *,
        full: Closure | None = None,
        m: int | None = None,
        sampled: int | None = None,
        ascent: int | None = None,
        clip: float | None = None,
        check_finite: bool = True,
        cosine: bool = False,
        gradient_noise: bool = False,
        parallel: bool | str = "auto",
        sync: Sync = "auto",
        max_norm: float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        base = as_one(base)
        rule = on_micro_batches(rule, m, sampled, ascent, clip)
        checks.check_rule(rule, base)
        checks.check_options(full, parallel, max_norm, model)
        stepper = Stepper(
            base,
            rule,
            ranks=RankGroups(sync),
            radius=RadiusOfGroups(rho, base),  # the last check: it writes into the base's groups
            model=model,
            full=full,
            check_finite=check_finite,
            cosine=cosine,
            gradient_noise=gradient_noise,
            parallel=parallel,
            max_norm=max_norm,
        )
        # not super().__init__, which would make groups: they are the base's
        super().__setstate__(_fields(_stepper=stepper))

    def __getstate__(self) -> dict[str, Any]:
        return _fields(**{name: value for name, value in self.__dict__.items() if name in KEPT})

    def __repr__(self) -> str:
        key = self._stepper.radius.key
        rhos = [g.get(key) for g in self.param_groups]  # none yet in a group that was added to the base
        return f"{type(self).__name__}(rule={self.rule!r}, rho={rhos if rhos[1:] else rhos[0]}, base={self.base!r})"

    # ---- one call

    @_disable_dynamo  # a step moves weights between passes: a compiled training loop runs it as it is
    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Batch] | None = None, *, scaler: Scaler | None = None) -> Any:
        """Take one sharpness-aware step.

        An exception in any pass comes through with the weights at ``w`` bit for bit, gradients dropped, no step taken.

        Args:
            closure: zeroes the gradients, runs forward and backward and returns the loss (or an output with it: as
                ``loss``, or first of several); called as often as the method needs. A :class:`~steppe.Batch` for
                methods that look inside the batch; a list of them accumulates gradients (:class:`~steppe.Batches`).
                Without one, the step that :meth:`backward` has begun is finished; where there is none, the base steps
                on the gradients in ``p.grad``, with one warning.
            scaler: the scaler that the closure scales its loss by before ``backward()``; it returns the loss unscaled.
                (A ``Batch`` scales its own.) Gradients are unscaled, an overflow in any pass skips the step, and
                ``scaler.update()``, to be called after every step, backs off.

        Returns:
            The loss at ``w`` (``L(w)``, not that at ``w + eps``); ``None`` without a closure.

        Raises:
            TypeError: the method looks inside the batch and ``closure`` is no ``Batch``; nothing has been changed.
            ValueError: a group's ``rho`` is negative or not finite; nothing has been changed.
            RuntimeError: called by ``scaler.step``, or twice without ``scaler.update()`` between, or after
                ``first_step``, or with a closure after :meth:`backward`; nothing has been changed.
        """
        self._refuse_grad_scaler()
        if closure is None and self._pending is not None:
            pending, self._pending = self._pending, None
            self._move(pending)
            return None
        self._refuse_unfinished()
        if closure is None:
            self._base_step()
            seen = Telemetry(steps=steps_of(self.param_groups), skipped=self.telemetry.skipped)
            self.telemetry = seen.following(self.telemetry)
            return None
        f, pending = self._stepper.passes(as_closure(closure), scaler)
        self._report(f, pending)
        loss = f.passes.log.loss
        del f  # with it the memory of g
        self._move(pending)
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def backward(
        self, closure: Closure | Sequence[Batch], *, scaler: Scaler | None = None, rescale: bool = False
    ) -> Any:
        """Run a step's passes without its move, in place of ``loss.backward()``.

        Every ``p.grad`` is left with what the base will see, and ``step()``, without a closure, moves. So loops and
        frameworks that clip, log or check gradients before ``step()`` do so to the combined gradient, once a step.
        WSAM's term beside the base is not among the gradients. It does not add to earlier gradients: to accumulate,
        pass a list of batches. Of a step that must be skipped the gradients are NaN, and ``step()`` moves nothing.

        Args:
            closure: as for :meth:`step`.
            scaler: as for :meth:`step`; the gradients are left unscaled.
            rescale: a framework takes the gradients from here, and may call ``scaler.unscale_``, ``scaler.step`` and
                ``scaler.update`` by itself: leave them scaled, as after ``scaler.scale(loss).backward()``.

        Returns:
            The loss at ``w``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`step`; called again before ``step()`` or ``zero_grad()``.

        Example:
            >>> loss = optimizer.backward(closure)
            >>> torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            >>> optimizer.step()
        """
        self._refuse_unfinished()
        closed = as_closure(closure)
        f, pending = self._stepper.passes(closed, scaler)
        self._report(f, pending)
        pending.leave_gradients(f, (scaler or getattr(closed, "scaler", None)) if rescale else None)
        pending.rescaled = rescale
        self._pending = pending
        return f.passes.log.loss

    # ---- two calls

    @_disable_dynamo
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: Scaler | None = None) -> None:
        """Take the gradients in ``p.grad`` as ``g`` and move to ``w + eps``: the calling convention of ``sam.py``.

        Then run forward and backward once more on the same batch, and call :meth:`second_step`. Prefer :meth:`step`
        with a closure, which also draws the same dropout masks in both passes. Running statistics see the first forward
        alone here too; there is no closure to look at, so compiled code that runs the model needs ``model=``.

        Args:
            zero_grad: accepted for that convention: gradients are dropped in any case.
            scaler: the scaler that the losses of both passes are scaled by; ``scaler.update()`` after ``second_step``.

        Raises:
            TypeError: the method needs more than two gradients.
            RuntimeError: called twice without ``second_step`` between, or without a backward before; nothing has been
                changed.

        Example:
            >>> criterion(model(x), y).backward()
            >>> optimizer.first_step(zero_grad=True)
            >>> criterion(model(x), y).backward()
            >>> optimizer.second_step(zero_grad=True)
        """
        self._refuse_unfinished()
        half = self._stepper.half_step(scaler)
        half.look()
        self._half = half

    @_disable_dynamo
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Take the gradients in ``p.grad`` as ``g_adv``, move back to ``w`` bit for bit, and step.

        Args:
            zero_grad: drop the gradients afterwards.

        Raises:
            RuntimeError: ``first_step`` was not called before, or no backward since; the weights are ``w``.
        """
        if self._half is None:
            raise RuntimeError("call first_step() before second_step()")
        half, self._half = self._half, None
        self._pending = self._stepper.second_half(half)
        self._report(half.f, self._pending)
        del half
        self.step()  # so that hooks and schedulers of this optimizer see a step
        if zero_grad:
            self.zero_grad()

    def cancel_step(self) -> None:
        """Move back to ``w`` after ``first_step``, and forget the step."""
        half, self._half = self._half, None
        if half is not None:
            half.leave()

    # ---- after the passes

    def _move(self, pending: Pending | Skipped) -> None:
        pending.move(self.base, self._stepper.state)
        if isinstance(pending, Pending):
            self.telemetry = replace(self.telemetry, steps=self._count_step())

    def _report(self, f: Oracle, pending: Pending | Skipped) -> None:
        log, skip = f.passes.log, isinstance(pending, Skipped)
        self.telemetry = self._stepper.report(f, self.telemetry, skip)
        if skip and f.passes.scale is None:  # a scaler looks for its scale by overflows
            self._warn_once("a gradient is not finite: this step is skipped; telemetry.skipped counts")
        elif not skip and not log.any_gradient:
            self._warn_once("no parameter received a gradient: does the closure call backward()?")


def _fields(**fields: Any) -> dict[str, Any]:
    """Return the fields of an optimizer that is not in the middle of a step."""
    return {"telemetry": Telemetry(), "_warned": set(), **fields, "_pending": None, "_half": None}
