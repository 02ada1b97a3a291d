"""The rehearsal: the update of m-SAM both ways, shared and serial, on real micro-batches; the result is a plan."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from steppe.batch import Batch, Batches
from steppe.engine.oracle import Oracle
from steppe.engine.replay import RandomState, is_compiled
from steppe.engine.vector import is_sharded
from steppe.factored.draws import Draws
from steppe.factored.rehearsal import Rehearsal
from steppe.factored.rounding import InFloat32, no_cast
from steppe.factored.shared import SharingPlan
from steppe.factored.tracked import CannotFactor, Differs, NotProven, Tracked
from steppe.factored.unseen import watch


def rehearsed(f: Oracle, batch: Batch, m: int | None) -> SharingPlan:
    """Return the plan for micro-batches of ``m``, proven on this batch, or why there is none.

    With ``m=None`` it is for the gradients of single examples, which may not influence one another at all.

    The update of SAM on micro-batches is made by shared passes and by the serial loop, on the batch as it is and on a
    random permutation of its examples. The two have to agree to
    :class:`~steppe.factored.rounding.Rounding` in the losses at ``w`` and at
    ``w + eps_k`` and in the update, summed over at most ``TRIED`` micro-batches of each order: the first, the last,
    which may be smaller, and random ones. A difference beyond 30 times the bound is the model's; a smaller one may be
    bad luck, and a later batch tells.

    The price is 5 forwards and 6 backwards of the batch, and 4 of each of at most ``4 TRIED`` micro-batches in all.
    In half precision the second comparison is made in float32, for a forward and two backwards more.
    Dropout is off, and a micro-batch draws the other random numbers that it has in the batch. A little noise is added
    to every parameter, because a weight of zero hides what comes before it. Weights, gradients, buffers and random
    streams are restored bit for bit. State of the model that is not in a buffer sees the additional passes.
    """
    tracked = Tracked.of(f, batch)
    before = RandomState.now(f.passes.parameters.devices)
    try:
        _check_supported(batch, f)
        watch()
        with f.passes.ranks.apart(), _noise_added(batch.model), Draws(len(batch)) as draws:
            rehearsal = Rehearsal(f, batch, m, draws)
            plan = rehearsal.plan(tracked)
            rehearsal.prove(plan, permuted=False)
            if not (rehearsal.rounding.low and _proven_in_float32(f, batch, m, draws, tracked)):
                rehearsal.prove(plan, permuted=True)
            return plan
    except NotProven:
        return SharingPlan(tracked, reason="the model does not do the same in every forward pass", final=False)
    except CannotFactor as error:
        return SharingPlan(tracked, reason=str(error), final=error.final)
    except Exception as error:  # the model itself fails: the loop will raise the same error
        return SharingPlan(tracked, reason=described(error), final=False)
    finally:
        before.restore()


def _proven_in_float32(f: Oracle, batch: Batch, m: int | None, draws: Draws, tracked: Tracked) -> bool:
    """Prove a model of low precision in float32; return whether it can be run so.

    Raises:
        Differs: it can, and examples influence one another.
    """
    try:
        exact = InFloat32(f.passes.parameters.tensors)
        with no_cast(exact.devices):
            rehearsal = Rehearsal(f, batch, m, draws, exact)
            rehearsal.prove(rehearsal.plan(tracked), permuted=True)
    except Differs:
        raise
    except Exception:  # by an operation that has one dtype alone
        return False
    return True


def _check_supported(batch: Batch, f: Oracle) -> None:
    parameters = f.passes.parameters.tensors
    if isinstance(batch, Batches):
        raise CannotFactor("the batch is accumulated: the factors of one batch are held at a time")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for module in batch.modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and distributed:
            raise CannotFactor("SyncBatchNorm averages statistics over the processes")
        if module._backward_hooks or module._backward_pre_hooks or has_global_hooks():
            raise CannotFactor(f"{type(module).__name__} has backward hooks")
        if is_compiled(module):
            raise CannotFactor("the model is compiled")
        if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
            raise CannotFactor(f"{module.original_name} is TorchScript")
    if any(map(is_sharded, batch.model.parameters())):
        raise CannotFactor("parameters are sharded")
    if len({p.device for p in parameters}) > 1:
        raise CannotFactor("parameters are on several devices")
    if any(map(has_hooks, parameters)):
        raise CannotFactor("parameters have gradient hooks")


def described(error: Exception) -> str:
    """Return an error as one line of the log."""
    return f"{type(error).__name__}: {error}"


def has_global_hooks() -> bool:
    """Return whether all modules have a backward hook."""
    return bool(global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)


def has_hooks(p: Tensor) -> bool:
    """Return whether a hook may change or use the gradient of a parameter."""
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


@contextmanager
def _noise_added(model: nn.Module) -> Iterator[None]:
    """Add a little noise to every parameter, and restore it bit for bit: a weight of zero hides what comes before."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for seed, p in enumerate(parameters):
                random = torch.Generator(device=p.device).manual_seed(seed)
                size = p.float().square().mean().sqrt() * 0.05 + 0.01
                p.add_((torch.randn(p.shape, generator=random, device=p.device) * size).to(p.dtype))
        yield
    finally:
        if parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)
