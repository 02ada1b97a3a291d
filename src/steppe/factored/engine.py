"""Shared passes: m-SAM, RW-SAM and SAM by per-example gradients from one pass over the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TypeVar

import torch
from torch import Tensor

from steppe.batch import Batch, Batches
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.replay import RandomState
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.factored.black_box import black_boxes
from steppe.factored.cost import TWO_PASSES, WEIGHTED
from steppe.factored.gradients import Harvest
from steppe.factored.operations import OPERATIONS
from steppe.factored.parts import Parts
from steppe.factored.plan import Entry, entry_for, refusal
from steppe.factored.record import Factors
from steppe.factored.rehearsal import Plan, described
from steppe.factored.tape import CannotFactor, Look, See, Site
from steppe.factored.terms import squared_norms, uncast
from steppe.pieces.protocol import declared
from steppe.rule import Rule

T = TypeVar("T")


class SharedPasses:
    """The shortcuts of one step (:class:`steppe.engine.oracle.Shortcuts`), where the batch's model has factors.

    Args:
        parallel: ``"auto"`` where the model allows it and it is cheaper, ``True`` always, or an error; ``False`` never.
    """

    def __init__(self, parallel: bool | str = "auto") -> None:
        self.parallel = parallel
        self._entries: dict[int, tuple[Batch, Entry]] = {}  # by the id of a batch, which is kept so that its id is
        self._factors: tuple[Oracle, Factors] | None = None  # between example_norms and weighted_gradient

    # ---- m-SAM

    def update(self, f: Oracle, rule: AnyRule, m: int | None) -> Update | None:
        """Return the update of ``Micro(m, rule)`` in two passes over the whole batch, or that of ``rule`` for ``None``.

        ``None`` where the rule or the model does not allow it, or where the plain way is cheaper.

        Raises:
            ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
        """
        if not self.parallel or type(rule) is not Rule or not shareable(rule) or not self._worth(f, m):
            return None
        parts = Parts(len(f.batch()), len(f.batch()) if m is None else m)
        before, needs_g = RandomState.now(f.passes.parameters.devices), f.needs_g
        reweighted = declared(rule.sample).weights == "norms"  # by norms that the whole pass gives
        early = None if reweighted else lambda look: Harvest(look, parts, TWO_PASSES, f.rho.values)
        factors = self.first_pass(f, needs_g, early=early)
        if factors is None:
            return None
        try:
            if reweighted:
                _reweight(factors, parts, rule)
            see = _perturbed(f, factors, parts, rule)
            if needs_g:
                f.g = factors.g
            with f.passes.moved():
                g_adv = f.passes.gradient(under=black_boxes(f.batch().model, see))
        except Exception as error:  # the serial loop will raise it again, if it is the model's own
            self._fall_back(f, factors.entry, error, before)
            return None
        factors.entry.succeed()
        f.passes.log.compare(f.g if needs_g else None, g_adv)
        return rule.combine(f, g_adv)

    def _worth(self, f: Oracle, m: int | None) -> bool:
        """Tell whether to try: one part, or on a CPU two, gain by shared passes only where plain SAM does."""
        if m is None:
            return not f.needs_g and self._cheaper_than_sam(f)
        few = 1 if f.passes.parameters.devices else 2
        return len(f.batch()) > few * m or self.parallel is True or self._cheaper_than_sam(f)

    def _cheaper_than_sam(self, f: Oracle) -> bool:
        """Tell whether plain SAM's own two passes cost less with factors, by counted multiplications."""
        if self.parallel != "auto" or not f.is_whole or not f.passes.ranks.alone:
            return False
        batch = f.passes.closure
        if not isinstance(batch, Batch) or isinstance(batch, Batches):  # of accumulated batches one is held at a time
            return False
        plan = self.entry(f, batch).plan
        return not plan.reason and plan.cost < 0.95

    # ---- RW-SAM

    def example_norms(self, f: Oracle) -> Tensor | None:
        """Return ``norm(grad f_i)`` of every example, shape ``(n,)``; ``None`` where the model does not factor.

        The factors are kept for the weighted gradient. Those of accumulated batches are held one batch at a time, in
        passes that count for nothing else, so that the weighted gradient is an ordinary pass over them again.
        """
        if not self.parallel:
            return None
        with f.passes.ranks.within():
            if isinstance(f.passes.closure, Batches):
                norms = self._norms_by_batch(f, f.passes.closure)
            else:
                factors = self.first_pass(f, early=_by_example)
                norms = None if factors is None else self._or_fall_back(f, factors, factors.by_example)
                self._factors = None if factors is None or norms is None else (f, factors)
        return self._agreed(f, norms)

    def weighted_gradient(self, f: Oracle, weights: Tensor) -> Vector | None:
        """Return ``sum_i p_i grad f_i`` from the factors of :meth:`example_norms`; ``None`` where there are none."""
        if self._factors is None or self._factors[0] is not f:
            return None
        (_, factors), self._factors = self._factors, None
        d = self._agreed(f, self._or_fall_back(f, factors, lambda: factors.weighted(weights)))
        if d is not None:
            factors.entry.succeed()
        return d

    def _agreed(self, f: Oracle, found: T | None) -> T | None:
        """Return what was found, if it was on all ranks that share gradients."""
        found = f.passes.ranks.agreed(found, f.passes.parameters.tensors[0].device)
        if found is None:
            self._factors = None
        return found

    def _norms_by_batch(self, f: Oracle, batches: Batches) -> Tensor | None:
        entries = [self.entry(f, batch) for batch in batches.chunks]
        if not all(self._allowed(entry.plan) for entry in entries):
            return None
        found: list[Tensor] = []
        with f.passes.trial():
            for (_, part), entry in zip(f.parts(batches.chunks), entries, strict=True):
                factors = self.first_pass(part, entry=entry, early=_by_example)
                norms = None if factors is None else self._or_fall_back(part, factors, factors.by_example)
                if norms is None:
                    break
                entry.succeed()
                found.append(norms)
                del factors
        return torch.cat(found) if len(found) == len(entries) else None

    def _or_fall_back(self, f: Oracle, factors: Factors, make: Callable[[], T]) -> T | None:
        before = RandomState.now(f.passes.parameters.devices)
        try:
            return make()
        except Exception as error:
            self._fall_back(f, factors.entry, error, before)
        return None

    # ---- the first pass

    def first_pass(
        self,
        f: Oracle,
        needs_g: bool = False,
        entry: Entry | None = None,
        early: Callable[[Look], Harvest] | None = None,
    ) -> Factors | None:
        """Run the first pass and record its factors; ``None`` where the model does not factor.

        Args:
            f: the oracle, of one batch.
            needs_g: whether ``g`` is wanted too.
            entry: the entry of its model, where that has been asked for already.
            early: gathers gradients during the backward pass, so that what they are made of is freed there.

        Raises:
            ValueError: ``parallel=True`` was asked for and the model does not factor; the message says why.
        """
        batch = f.batch("its examples' gradients")
        entry = entry or self.entry(f, batch)
        if not self._allowed(entry.plan):
            return None
        parameters = f.passes.parameters
        before = RandomState.now(parameters.devices)
        look = Look(entry.plan.tracked, OPERATIONS, entry.plan.pool)
        harvest = early(look) if early else None
        look.gather = None if harvest is None else _gathering(harvest, entry.plan)
        try:
            wrt = None if needs_g else [False] * len(parameters.tensors)
            g = f.passes.gradient(wrt=wrt, under=black_boxes(batch.model, look))
            look.check()
            entry.plan.apply(look)
            scale = batch.loss_scale(parameters.tensors[0].detach())
            gathered = None if harvest is None else harvest.gradients()
            return Factors(look, len(batch), parameters.tensors, g, entry, scale, gathered)
        except Exception as error:  # the serial loop will raise it again, if it is the model's own
            self._fall_back(f, entry, error, before)
        finally:
            look.gather = None  # else what is gathered would hang in a circle
        return None

    def entry(self, f: Oracle, batch: Batch) -> Entry:
        """Return what is known of the batch's model; asked again in the same step it is the same."""
        if id(batch) not in self._entries:
            self._entries[id(batch)] = batch, entry_for(f, batch)
        return self._entries[id(batch)][1]

    def _allowed(self, plan: Plan) -> bool:
        """Tell whether micro-batches can share passes.

        Raises:
            ValueError: they cannot, and ``parallel=True`` was asked for; the message says why.
        """
        if not plan.reason or (plan.mixes and self.parallel is True):
            return True
        if self.parallel is True:
            raise refusal(plan.reason)
        return False

    def _fall_back(self, f: Oracle, entry: Entry, error: Exception, before: RandomState) -> None:
        """After an error in the shared passes, restore the random state for the serial loop.

        Raises:
            ValueError: ``parallel=True`` leaves no serial loop, and the model does not factor.
            Exception: ``error`` itself, where there is none and it is another one.
        """
        if isinstance(error, CannotFactor):
            entry.fail(str(error))
        elif self.parallel is True:
            raise error
        else:
            entry.fail(described(error), f.step)
        before.restore()
        if self.parallel is True:
            raise refusal(str(error)) from error


def shareable(rule: Rule) -> bool:
    """Tell whether the rule's micro-batches can share two passes: weighted by norms, radial, on all, linear."""
    return (
        declared(rule.sample).weights is not None
        and declared(rule.geometry).radial
        and declared(rule.select).everything
        and declared(rule.combine).linear
    )


def _gathering(harvest: Harvest, plan: Plan) -> Callable[[Site], None]:
    def gather(site: Site) -> None:
        if site.layout is None:  # the first one
            plan.apply(harvest.look)
        with uncast(site.deltas[0]):
            harvest.take(site)
        site.let_go()

    return gather


def _by_example(look: Look) -> Harvest:
    return Harvest(look, Parts(look.tracked.n, 1), WEIGHTED)


def _reweight(factors: Factors, parts: Parts, rule: Rule) -> None:
    """Every micro-batch's gradient becomes ``sum_i p_i grad f_i``, with weights over its own examples."""
    norms = factors.norms(Parts(factors.n, 1))
    p = [rule.sample.weights(norms[a:b].reshape(-1, m)) * m for a, b, m in parts.spans]  # type: ignore[attr-defined]
    factors.scale(torch.cat([chunk.flatten() for chunk in p]))


def _perturbed(f: Oracle, factors: Factors, parts: Parts, rule: Rule) -> See:
    """The second pass: ``eps_k = rho radial(norm(G_k)) G_k`` of every micro-batch."""
    rho = f.rho.values
    matrices, small = factors.gathered or factors.of(parts, rho=rho)
    with torch.no_grad():
        squares = {
            radius: squared_norms(_with(radius, matrices, rho), _with(radius, small, rho))
            for radius in sorted({rho[i] for i in (*matrices, *small)})
        }
        total = _sum(squares.values()).clamp_min(0)
        per_mean = factors.to_own_mean(parts, total)
        norms = per_mean * total.sqrt()
        factor = rule.geometry.radial(norms) * per_mean  # type: ignore[attr-defined]
        scale = {radius: radius * factor for radius in squares}
        eps = {i: scale[rho[i]].reshape(-1, *[1] * (t.dim() - 1)) * t for i, t in small.items()}
        eps_squares = _sum(scale[radius].square() * square for radius, square in squares.items())
        _log(f, norms, eps_squares.clamp_min(0).sqrt(), parts.sizes(total) / factors.n)
    for site in factors.look.sites:
        site.let_go()
    big = {i: (gradient, scale[rho[i]]) for i, gradient in matrices.items()}
    return See(factors.look.tracked, OPERATIONS, factors.look.sites, parts, big, eps)


def _with(radius: float, found: Mapping[int, T], rho: Sequence[float]) -> list[T]:
    return [value for i, value in found.items() if rho[i] == radius]


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return reduce(add, tensors)


def _log(f: Oracle, g_norms: Tensor, eps_norms: Tensor, shares: Tensor) -> None:
    """Log the norms of every micro-batch, shape ``(k,)``; telemetry has their mean."""
    if f.passes.scale is not None:
        f.passes.scale.watch(g_norms)
    f.passes.log.norms.append(g_norms.sum())
    f.passes.log.numbers["g_norm"] = g_norms @ shares
    f.passes.log.numbers["eps_norm"] = eps_norms @ shares
