"""A step whose two passes are the user's own: ``first_step()``, a backward, ``second_step()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from steppe.engine.oracle import NotFinite, Oracle
from steppe.engine.passes import frozen_statistics
from steppe.engine.update import Update
from steppe.rule import AnyRule, Every, Rule, looks_inside


def needs_more() -> Tensor:
    """The closure of a step that has none."""
    raise TypeError(
        "this method takes passes of its own, not just two gradients: call step() with a closure or a Batch"
    )


class TwoCalls:
    """Between the two calls the weights are ``w + eps``, and normalisation statistics are put back afterwards.

    Args:
        f: an oracle whose closure is :func:`needs_more`.
        rule: the step's rule.
        modules: those whose statistics the second pass must not change.

    Raises:
        TypeError: the rule needs more than the gradients at ``w`` and ``w + eps``; nothing has been changed.
    """

    def __init__(self, f: Oracle, rule: AnyRule, modules: Callable[[], Iterable[nn.Module]]) -> None:
        while isinstance(rule, Every):
            rule = rule.between if f.step % rule.k else rule.rule
        if looks_inside(rule) or not (isinstance(rule, Rule) or getattr(rule, "only_g", False)):
            raise TypeError(f"first_step() and second_step() serve rules of two gradients, not {rule!r}: call step()")
        self.f, self.rule, self.finite = f, rule, True
        self._modules = modules
        self._away = ExitStack()

    def look(self) -> None:
        """Take the gradients that are there as ``g``, and go to ``w + eps``."""
        given = [p.grad for p in self.f.parameters.tensors]
        try:
            self.f.keep(self.f.given())
            rule = self.rule if isinstance(self.rule, Rule) else None
            eps = rule.perturbation(self.f) if rule else None
            self._away.enter_context(frozen_statistics(self._modules()))  # also where nothing moves: a pass follows
            if rule and eps:
                self._away.enter_context(self.f.at(eps, keep_g=rule.uses_g))
        except NotFinite:
            self.finite = False
        except BaseException:
            self.leave()
            for p, g in zip(self.f.parameters.tensors, given, strict=True):
                p.grad = g
            raise

    def see(self) -> Update | None:
        """Take the gradients that are there as ``g_adv``, go back to ``w``, and combine; ``None`` is no update."""
        try:
            g_adv = self.f.given()
        finally:
            self.leave()
        if not self.finite:
            return None
        f = self.f
        if not f.ranks.alone:
            if getattr(self.rule, "uses_g", True):  # this rank's, or the mean already: its mean is the mean
                f.keep(f.ranks.mean(f.g, f.parameters.tensors))
            f.ranks.averaged = True
        if isinstance(self.rule, Rule):
            f.compare(g_adv)
            return self.rule.combine(f, g_adv)
        return self.rule(f)

    def leave(self) -> None:
        """Back to ``w``."""
        with torch.no_grad():
            self._away.close()
