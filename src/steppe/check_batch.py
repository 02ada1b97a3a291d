"""What a rule needs of its batch, and whether the parts of a batch add up to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Batches, chunks_of
from steppe.engine.checks import warn
from steppe.engine.oracle import AnyRule, Oracle
from steppe.engine.outputs import at_outputs, recording
from steppe.engine.passes import PARTS
from steppe.engine.replay import is_compiled
from steppe.engine.vector import LOW
from steppe.mean_batch import MeanBatch
from steppe.pieces.protocol import declared, pieces_of
from steppe.pieces.rules import Functional
from steppe.rule import Micro


def check_batch(f: Oracle, rule: AnyRule, known: bool) -> bool:
    """Refuse a closure that the rule cannot look into, also where only another step's rule does.

    A mean over parts of the batch is compared with the mean over the batch, once. Where the rule needs the gradient at
    the model's outputs, a first forward tells once whether the criterion is a function of these alone.

    Args:
        f: the oracle of the step.
        rule: the optimizer's rule.
        known: whether this has been done before.

    Returns:
        Whether it has been done by now.

    Raises:
        TypeError: the rule looks at parts, at single examples or at outputs, and the closure does not know them.
        ValueError: the batch weighs nothing.
    """
    needs = declared(rule)
    if needs.parts or isinstance(f.passes.closure, Batches):
        _check_weight(f)
    if not f.rho.largest() or not (needs.examples or needs.parts):
        return known
    batch = f.batch(repr(rule) if needs.examples else PARTS)
    if needs.examples:
        batch.require_losses(repr(rule))
    if known:
        return True
    first = chunks_of(batch)[0]
    if isinstance(first, MeanBatch) and _holds(rule, Micro):
        with f.passes.trial(), f.passes.ranks.apart():
            _compare(first)
        return True
    if needs.examples and _holds(rule, Functional):
        _check_outputs(f, first)
        return True
    return False  # a MeanBatch may come later


def _holds(rule: AnyRule, kind: type) -> bool:
    """Tell whether a rule is of this kind, or is made of one that is."""
    return any(isinstance(piece, kind) for piece in pieces_of(rule))


def _check_outputs(f: Oracle, batch: Batch) -> None:
    """Refuse a batch whose loss is not a function of the model's outputs; one forward."""
    outputs: list[Tensor] = []
    recorded, refused = recording(batch, outputs, f.passes.parameters), None
    with f.passes.trial(), f.passes.ranks.apart():
        try:
            with torch.set_grad_enabled(not f.passes.parameters.sharded):  # else a compiled model is compiled again
                recorded.losses()
            at_outputs(batch, outputs, f.passes.parameters)
        except TypeError as error:  # raised when random numbers and running statistics are back
            refused = error
    if refused is not None:
        raise refused


def _check_weight(f: Oracle) -> None:
    """Refuse a batch that weighs nothing, on all ranks where one would wait for another."""
    batch = f.passes.closure
    if not isinstance(batch, Batch) or batch.per_example:
        return
    nothing = torch.tensor(float(not batch.weight), device=f.passes.parameters.device)
    if f.passes.ranks.shared_mean(nothing, f.passes.parameters.sharded):
        where = "got 0" if nothing else "got 0 on another rank"
        raise ValueError(f"weight must be above 0 for the data of the whole batch, {where}: has it no labelled token?")


def _compare(batch: MeanBatch) -> None:
    """Warn where the mean over the batch is not the mean over its halves, by their weights; three forwards."""
    modules = batch.modules()
    if len(batch) < 2 or any(map(is_compiled, modules)):  # it would be compiled again
        return
    halves = batch.split((len(batch) + 1) // 2)  # on every rank two, as sharded parameters are gathered
    try:
        with torch.no_grad(), evaluated(modules):
            whole, parts = batch.value(), [half.value() for half in halves]
    except Exception:  # in evaluation mode the model has no loss: that cannot be told
        return
    if not batch.weight:  # the mean is over nothing; other ranks may have waited for these forwards
        return
    pairs = zip((half.weight for half in halves), parts, strict=True)
    total = sum(weight / batch.weight * float(part) for weight, part in pairs if weight)
    low = whole.dtype in LOW or torch.is_autocast_enabled(whole.device.type)
    if abs(total - float(whole)) > (3e-2 if low else 1e-4) * max(abs(total), abs(float(whole)), 1e-3):
        warn(
            f"the loss of the batch, {float(whole):.6g}, is not the weighted mean of its parts' losses, {total:.6g}: "
            "m= is then another objective. Is it a mean over tokens: pass weight=, the number of tokens in the data. "
            "Does it compare examples with one another, as contrastive losses do: leave m= out"
        )


@contextmanager
def evaluated(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Set modules to evaluation mode, without dropout and batch statistics, and put every one's mode back."""
    before = [m.training for m in modules]
    try:
        for m in modules:
            m.training = False
        yield
    finally:
        for m, training in zip(modules, before, strict=True):
            m.training = training
