"""A step in two calls, ``first_step`` and ``second_step``, between which the user runs a pass."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.passes import Passes
from steppe.engine.replay import frozen_statistics
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.engine.weights import NotFinite
from steppe.pieces.protocol import declared
from steppe.rule import Rule


def no_closure() -> Tensor:
    """Stand in for the closure between ``first_step`` and ``second_step``."""
    raise TypeError(
        "this method takes passes of its own, not just two gradients: call step() with a closure or a Batch"
    )


def _gradient(passes: Passes, call: str) -> Vector:
    """Return the gradients in ``p.grad``; refuse a call that finds none."""
    g = passes.given()
    if not g.present():
        raise RuntimeError(f"{call} found no gradients: run forward and loss.backward() before it")
    return g


class HalfStep:
    """A step between ``first_step`` and ``second_step``: the weights are ``w + eps``.

    Running statistics are put back to what the first pass has left.

    Args:
        f: an oracle whose closure is :func:`no_closure`.
        rule: the rule of the step.

    Raises:
        TypeError: the rule needs more than the gradients at ``w`` and ``w + eps``; nothing has been changed.
    """

    def __init__(self, f: Oracle, rule: AnyRule) -> None:
        self.f, self.rule, self.finite = f, rule, True
        needs = declared(rule)
        if needs.examples or needs.parts or not (isinstance(rule, Rule) or not needs.g_adv):
            raise TypeError(f"first_step() and second_step() serve rules of two gradients, not {rule!r}: call step()")
        self.ran: list[nn.Module] = []  # the modules of the second pass
        self._away = ExitStack()

    def look(self) -> None:
        """Take the gradients in ``p.grad`` as ``g``, and move to ``w + eps``."""
        passes = self.f.passes
        given = [p.grad for p in passes.parameters.tensors]
        try:
            self.f.g = _gradient(passes, "first_step()")
            eps = self.rule.perturbation(self.f) if isinstance(self.rule, Rule) else None
            self.ran = self._away.enter_context(frozen_statistics(passes.modules()))  # also where nothing moves
            if eps:
                self._away.enter_context(self.f.at(eps))
        except NotFinite:
            self.finite = False
        except BaseException:
            self.leave()
            for p, g in zip(passes.parameters.tensors, given, strict=True):
                p.grad = g
            raise

    def see(self) -> Update | None:
        """Take the gradients in ``p.grad`` as ``g_adv``, move back to ``w``, and combine; ``None`` is no update."""
        f, ranks = self.f, self.f.passes.ranks
        try:
            g_adv = _gradient(f.passes, "second_step()") if isinstance(self.rule, Rule) else f.passes.given()
        finally:
            self.leave()
        if not ranks.alone:
            if f.needs_g:  # this rank's, or the mean already, whose mean it is
                f.g = ranks.mean(f.g, f.passes.parameters.tensors)  # on every rank, also on one that is not finite
            ranks.averaged = True
        if not self.finite:
            return None
        if isinstance(self.rule, Rule):
            f.passes.log.compare(f.g if f.needs_g else None, g_adv)
            return self.rule.combine(f, g_adv)
        return self.rule(f)

    def leave(self) -> None:
        """Move back to ``w``."""
        with torch.no_grad():
            self._away.close()
