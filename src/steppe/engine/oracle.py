"""What a rule may ask of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import reduce
from operator import add

from torch import Tensor, nn

from steppe.batch import Batch, Batches, chunks_of
from steppe.engine.ddp import Ranks
from steppe.engine.grad_scaler import LossScale
from steppe.engine.memory import Memory, Remembering
from steppe.engine.outputs import at_outputs, holding, recording
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import PARTS, Closure, Passes
from steppe.engine.shortcuts import Shortcuts
from steppe.engine.update import Update
from steppe.engine.vector import Vector
from steppe.engine.weights import hessian_vector_product, moved
from steppe.pieces.protocol import Declaration

AnyRule = Callable[["Oracle"], Update]  # any function from oracle to update is a rule


class Oracle(Remembering):
    """One batch's loss as a function of the weights, for the length of one step.

    ``g`` is the gradient at ``w``; ``with f.at(eps):`` moves to ``w + eps``, where ``grad`` and ``losses`` answer, and
    puts the weights back bit for bit, in place, also when the closure raises.

    Args:
        closure, parameters, modules, ranks, scale: as for :class:`~steppe.engine.passes.Passes`.
        declares: what the rule of the step declares (:mod:`steppe.pieces.protocol`).
        step: how many steps came before, for rules that change with time and pieces that draw random numbers.
        memory: what the rule remembers, and the base's state.
        full: the closure over the larger batch of n-SAM.
        keep_g: hold ``g`` until the end of the step, at the cost of one copy of the parameters.
        guard: take no pass at weights that are not finite.
        shortcuts: cheaper ways to some answers (:class:`steppe.factored.engine.SharedPasses`).
    """

    def __init__(
        self,
        closure: Closure,
        parameters: Parameters,
        *,
        declares: Declaration | None = None,
        step: int = 0,
        memory: Memory | None = None,
        full: Closure | None = None,
        keep_g: bool = False,
        guard: bool = False,
        shortcuts: Shortcuts | None = None,
        modules: Callable[[], Iterable[nn.Module]] = tuple,
        ranks: Ranks | None = None,
        scale: LossScale | None = None,
    ) -> None:
        self.passes = Passes(closure, parameters, modules, ranks, scale)
        self.step = step
        self._declares = declares or Declaration()
        self._memory = memory or Memory(parameters.tensors)
        self._full, self.guard, self._shortcuts, self._keep_g = full, guard, shortcuts, keep_g
        self._whole: Oracle | None = None  # the oracle of the batch that this one is a part of
        self._g: Vector | None = None
        self._freed = False  # whether g was freed, as the rule declares
        self._full_g: Vector | None = None
        self._looking = False  # whether eps is being computed

    @property
    def w(self) -> Vector:
        """The parameters, live: inside ``at`` they are ``w + eps``."""
        return Vector([p.detach() for p in self.passes.parameters.tensors])

    @property
    def names(self) -> Sequence[str] | None:
        """The names of the parameters, where the base optimizer was made from ``model.named_parameters()``."""
        return self.passes.parameters.names

    @property
    def rho(self) -> Radii:
        """The radius of every parameter: ``f.rho * v`` scales by group."""
        return self.passes.parameters.rho

    def movable(self, v: Vector) -> Vector:
        """Return ``v`` on the parameters that may move: not frozen, and with rho above 0."""
        return v.where(self.passes.parameters.movable)

    @contextmanager
    def at(self, eps: Vector) -> Iterator[None]:
        """Move to ``w + eps``; entries that are ``None`` stay.

        Raises:
            RuntimeError: the weights are away from ``w`` already.
        """
        if not self._looking:  # the move of the template, after which only what the rule declares is asked for
            if self._declares.losses_at_w:
                self.losses()
            self.passes.first_is_away |= not self._declares.g  # where no pass at w comes before, none comes after
            if not self.needs_g:
                self._g, self._freed = None, self._g is not None  # its memory serves the next pass
        with moved(self.passes, eps, self.guard):
            del eps  # frees the memory of g
            yield

    # ---- gradients and losses

    @property
    def g(self) -> Vector:
        """The gradient of the mean loss at ``w``; the pass runs once a step."""
        if self._g is None:
            if self.passes.away:
                raise RuntimeError("g is the gradient at w: ask for it before entering at()")
            if self._freed:
                raise RuntimeError("the rule declares g=False, but asks for g after the weights have moved")
            self._g = self.grad()
        return self._g

    @g.setter
    def g(self, g: Vector) -> None:
        self._g = g

    @property
    def knows_g(self) -> bool:
        """Whether ``g`` is there without a pass."""
        return self._g is not None

    def grad(
        self, on: Tensor | None = None, weights: Tensor | None = None, wrt: Sequence[bool] | None = None
    ) -> Vector:
        """Return the gradient here: of the mean loss, of the mean over ``on``, or of ``sum_i weights_i f_i``.

        Args:
            on: indices of examples, shape ``(k,)``.
            weights: one weight an example, shape ``(n,)``.
            wrt: which parameters to differentiate by; the others' entries are ``None`` and their backward is saved.

        Raises:
            TypeError: ``on`` or ``weights`` is given, and the closure is no :class:`~steppe.Batch`.
        """
        away = self.passes.away
        if self._looking and weights is not None and on is None and wrt is None and not away and self._shortcuts:
            d = self._shortcuts.weighted_gradient(self, weights)
            if d is not None:
                d = self.passes.made(d)
                if self._g is not None:  # from the same pass
                    self.passes.log.numbers["g_norm"] = self._g.norm()
                return d
        says = self._declares
        alone = (says.linear and not says.g) if away else not says.g_adv
        final = alone and self.is_whole and not self._looking  # the update is made of this gradient alone
        g = self.passes.gradient(on, weights, wrt, final=final)
        if away and not self._looking:
            self.passes.log.compare(self._g, g)
        return g

    def losses(self) -> Tensor:
        """Return every example's loss here, shape ``(n,)``, detached; at ``w`` the next ``grad`` reuses its graph."""
        return self.passes.losses()

    def losses_at_w(self) -> Tensor:
        """Return every example's loss at ``w``, shape ``(n,)``; inside ``at`` too, if they are known.

        Raises:
            RuntimeError: inside ``at``, where no pass at ``w`` came before.
        """
        known = self.passes.losses_at_w()
        if known is not None:
            return known
        if self.passes.away:
            raise RuntimeError(
                "the losses at w are not known here: declare losses_at_w=True, or ask for them before entering at()"
            )
        return self.losses()

    def example_norms(self) -> Tensor | None:
        """Return every ``norm(grad f_i)`` at ``w``, shape ``(n,)``, from the first pass; ``None`` without factors."""
        return None if self._shortcuts is None else self._shortcuts.example_norms(self)

    def adds(self) -> bool:
        """Tell whether gradients of parts add up to ``g``, as far as the engine of shared passes has verified it."""
        shortcuts, batches = self._shortcuts, chunks_of(self.batch())
        return shortcuts is not None and all(shortcuts.adds(self, batch) for batch in batches)

    def output_gradient(self) -> list[Tensor]:
        """Return the gradient of every example's loss by the model's output at ``w``, one tensor an accumulated batch.

        It comes from the pass of ``g``, so ask for it first.

        Raises:
            TypeError: the batch is none of :meth:`steppe.Batch.supervised`, the output is not one tensor, or the
                criterion uses parameters of the optimizer.
        """
        outputs: list[Tensor] = []
        batch = self.batch("the model's outputs")
        self.passes.detach_losses()
        with self.passes.over(recording(batch, outputs, self.passes.parameters)):
            self._g = self.grad()
        return at_outputs(batch, outputs, self.passes.parameters)

    def pull_back(self, v: Sequence[Tensor]) -> Vector:
        """Return the mean over the examples of ``J^T v_i``, ``J`` the Jacobian of the model's output here.

        ``v`` is in the form of :meth:`output_gradient`; with that itself the answer at ``w`` is ``g``.
        """
        with self.passes.over(holding(self.batch(), v)):
            return self.grad()

    def hvp(self, v: Vector) -> Vector:
        """Return the Hessian of the mean loss at ``w`` times ``v``.

        By the central difference ``(grad f(w + h v) - grad f(w - h v)) / 2 h``: two passes of the same batch and masks,
        on every model that has gradients. ``norm(h v)`` is the third root of the type's precision (5e-3 in float32).
        Exact on quadratics, but for rounding.

        Raises:
            TypeError: parameters are in low precision, which cannot hold so small a step.
        """
        return hessian_vector_product(self.passes, v, self.guard)

    def grad_on_full(self) -> Vector:
        """Return the gradient at ``w`` of the closure over the larger batch; the pass runs once a step.

        Raises:
            TypeError: the optimizer has no ``full=``.
        """
        if self._whole is not None:
            self._full_g = self._whole.grad_on_full()
        if self._full_g is None:
            if self._full is None:
                raise TypeError("this method takes its perturbation from a larger batch: pass full=, a closure over it")
            full = Passes(self._full, *self.passes.context)
            self._full_g = full.gradient()
            self.passes.log.add_other(full.log)
        self.passes.counted = True  # full's pass at w is the one that running statistics see
        return self._full_g

    # ---- the batch and its parts

    def batch(self, use: str = "the batch") -> Batch:
        """Return the closure as a :class:`~steppe.Batch`; ``TypeError`` if it is a plain closure."""
        return self.passes.batch(use)

    def update(self, rule: AnyRule) -> Update:
        """Return the rule's update on the batch, by shared passes where they are cheaper (:mod:`steppe.factored`)."""
        update = None if self._shortcuts is None else self._shortcuts.update(self, rule, None)
        return rule(self) if update is None else update

    def average(self, rule: AnyRule, m: int) -> Update:
        """Return the mean of the rule's updates over micro-batches of ``m`` examples, by their weights: ``size / n``.

        Micro-batches lie within one accumulated batch and one rank. They share passes where the model allows it.
        """
        self.passes.ranks.stay_within()
        if isinstance(self.passes.closure, Batches) and self.passes.closure.per_example:
            return reduce(add, (share * f.average(rule, m) for share, f in self.parts(self.passes.closure.chunks)))
        update = None if self._shortcuts is None else self._shortcuts.update(self, rule, m)
        if update is not None:
            return update
        return reduce(add, (share * rule(part) for share, part in self.parts(self.batch(PARTS).split(m))))

    def parts(self, batches: Sequence[Batch]) -> Iterator[tuple[float, Oracle]]:
        """Yield the oracle of every part with its share of the batch; average their logs. A share of 0 is left out."""
        self.passes.ranks.stay_within()
        for k, (batch, share) in enumerate(part for part in self.passes.weighed(batches) if part[1]):
            f = self.part(batch)
            yield share, f
            self.passes.log.add(share, f.passes.log, first=k == 0)

    def part(self, batch: Batch) -> Oracle:
        """Return the oracle of a part of the batch."""
        f = copy(self)
        f.passes, f._whole, f._g, f._freed = self.passes.of(batch), self, None, False
        return f

    @property
    def needs_g(self) -> bool:
        """Whether ``g`` is asked for after the weights have moved."""
        return self._declares.g or self._keep_g

    @property
    def is_whole(self) -> bool:
        """Whether this is the step's batch, not a part of it."""
        return self._whole is None

    @contextmanager
    def looking(self, says: Declaration) -> Iterator[None]:
        """Surround the computation of ``eps``: gradients and moves inside serve the perturbation, not the update.

        A function may call a ``Rule``: what that rule declares is added to what this oracle knows.
        """
        self._declares = self._declares.with_needs(says)
        before, self._looking = self._looking, True
        try:
            yield
        finally:
            self._looking = before
