"""The verdicts on the models seen so far: which share passes, and which run in a loop."""

import logging
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from steppe.batch import Batch, Batches
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters
from steppe.engine.replay import Snapshot, capturing, is_compiled
from steppe.engine.vector import is_sharded
from steppe.factored.rehearsal import rehearsed
from steppe.factored.shared import Proven, SharingPlan
from steppe.factored.sites import Tracked

log = logging.getLogger("steppe")

AGAIN = (1, 2, 8, 64, 512)  # uses before a rehearsal is repeated; then every 1024
TRIES = 3  # steps that may fail for a reason other than the model
ENTRIES = 32  # kept of a model; the least recently used go first


@dataclass
class Entry:
    """What is known of one model in one mode, with micro-batches of one size.

    A model that does not factor always runs in a loop. Where a batch could not tell, its step runs in a loop, and a
    later batch is asked. Memory or a device may fail one step and not the next: after ``TRIES`` failed steps without a
    successful one between them, all later steps run in a loop too. A step that the loop cannot take either is the same
    step when it is tried again, so it counts once.

    Attributes:
        plan: where examples lie in the last pass, or why passes are not shared.
        proven: what all its rehearsals have proven.
        uses: how many steps have asked.
        rehearsals: how many have rehearsed.
        sizes: the sizes of the batches that were rehearsed on.
        failed: the steps that failed since the shared passes last succeeded.
        said: the kinds of message that have been logged, or shown as a warning.
    """

    plan: SharingPlan
    proven: Proven = field(default_factory=Proven)
    uses: int = 0
    rehearsals: int = 0
    sizes: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    said: set[str] = field(default_factory=set)

    def rehearse(self, f: Oracle, batch: Batch, m: int | None) -> bool:
        """Rehearse, and return whether passes are shared; a proven model may meet a batch that cannot tell."""
        reason = _unsupported(f.passes.parameters, batch)
        plan = SharingPlan(self.plan.tracked, reason=reason) if reason else rehearsed(f, batch, m)
        self.rehearsals += 1
        self.sizes.add(len(batch))
        if not plan.reason:
            self.proven.update(plan.proven)
            self.plan = replace(plan, proven=self.proven)
        elif plan.final or not self.proven.paths:
            self.plan = plan
            self.log(plan.reason, always=plan.final)
        return not self.plan.reason

    def due(self, n: int, m: int | None) -> bool:
        """Return whether to rehearse again, because data may change what a model does, or may tell at last.

        Code may also decide by the number of examples: by one that is twice or half of those so far, or in the rest.
        """
        if self.plan.reason and self.plan.final:
            return False
        other = not min(self.sizes) / 2 < n < 2 * max(self.sizes) if self.sizes else False
        rest = n % (m or 1) > 0 and not any(size % (m or 1) for size in self.sizes)
        return self.uses in AGAIN or self.uses % 1024 == 0 or other or rest

    def fail(self, reason: str, step: int | None = None) -> None:
        """Note that this step, or with ``None`` every later step, runs in a loop."""
        if step is not None:
            self.failed.add(step)
        always = step is None or len(self.failed) >= TRIES
        if always and not self.plan.reason:
            self.plan = SharingPlan(self.plan.tracked, reason=reason)
        self.log(reason, always)

    def log(self, reason: str, always: bool) -> None:
        """Log a reason, each kind once."""
        if self._news(reason, f"log {always}"):
            log.info("micro-batches run in a loop%s: %s", "" if always else " in this step", reason)

    def warn(self, m: int, parts: int) -> None:
        """Warn once that micro-batches run in a loop for good, or may do so for long."""
        lasting = self.plan.final or self.rehearsals >= TRIES
        if self.plan.reason and lasting and self._news(self.plan.reason, "warning"):
            warnings.warn(
                f"micro-batches of m={m} run in a loop, because they cannot share passes here: {self.plan.reason}. "
                f"A step of this batch takes {2 * parts} passes over micro-batches instead of 2 over the batch. "
                "sampled=1 takes one of the micro-batches at a time; parallel=False takes the loop without this "
                "warning (docs/m-sam.md)",
                UserWarning,
                stacklevel=2,
            )

    def _news(self, reason: str, how: str) -> bool:
        kind = re.sub(r"[\d.]+(e[+-]\d+)?", "", reason) + how  # numbers differ from step to step
        news = kind not in self.said
        self.said.add(kind)
        return news


@dataclass
class Known:
    """All that is known of one model.

    Attributes:
        entries: by what may change how it runs, the last used last.
        steps: how many steps have asked.
        surprises: how many rehearsals were made because something was new.
    """

    entries: OrderedDict[Any, Entry] = field(default_factory=OrderedDict)
    steps: int = 0
    surprises: int = 0

    def may_rehearse(self) -> bool:
        """Return whether one more surprise keeps rehearsals rare: 16, and one in 16 steps."""
        self.surprises += 1
        return self.surprises <= 16 + self.steps // 16


_known: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known(model: nn.Module) -> Known:
    """Return what is known of a model."""
    return _known.setdefault(model, Known())


def entry_for(f: Oracle, batch: Batch, m: int | None) -> Entry:
    """Return the entry of this model for micro-batches of ``m``, or single examples, rehearsed where that is due.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the model has not been rehearsed before.
    """
    of_model = known(batch.model)
    of_model.steps += 1
    key = (m, *_key(f.passes.parameters, batch))
    entry = of_model.entries.get(key)
    captured = capturing(f.passes.parameters.devices)
    if entry is None:
        if captured:
            raise RuntimeError(
                "take this step once before it is captured in a CUDA graph: its model has to be verified first"
            )
        entry = Entry(SharingPlan(Tracked.of(f, batch), reason="it changes too often to be rehearsed", final=False))
        if of_model.may_rehearse():
            entry.rehearse(f, batch, m)
            key = (m, *_key(f.passes.parameters, batch))  # a model may add hooks in its first pass
        of_model.entries[key] = entry
        if len(of_model.entries) > ENTRIES:
            of_model.entries.popitem(last=False)
    elif entry.due(len(batch), m) and not captured:
        entry.rehearse(f, batch, m)
    of_model.entries.move_to_end(key)
    entry.uses += 1
    return entry


def prove(entry: Entry, f: Oracle, batch: Batch, m: int | None) -> bool:
    """Return whether a pass that does something new can be rehearsed now, and is proven."""
    may = not capturing(f.passes.parameters.devices) and known(batch.model).may_rehearse()
    return may and entry.rehearse(f, batch, m)


def _unsupported(parameters: Parameters, batch: Batch) -> str:
    """Return why no pass over the batch can be shared; nothing if it may be."""
    if isinstance(batch, Batches):
        return "the batch is accumulated: the factors of one batch are held at a time"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for module in batch.modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training and distributed:
            return "SyncBatchNorm averages statistics over the processes"
        if module._backward_hooks or module._backward_pre_hooks or _global_hooks():
            return f"{type(module).__name__} has backward hooks"
        if is_compiled(module):
            return "the model is compiled"
        if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
            return f"{module.original_name} is TorchScript"
    if any(map(is_sharded, batch.model.parameters())):
        return "parameters are sharded"
    if len({p.device for p in parameters.tensors}) > 1:
        return "parameters are on several devices"
    return "parameters have gradient hooks" if any(map(_has_hooks, parameters.tensors)) else ""


def _global_hooks() -> bool:
    return bool(global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None))


# ---- what may change how a model runs, but for its data


def _key(parameters: Parameters, batch: Batch) -> tuple[Any, ...]:
    modules, own = batch.modules(), Snapshot.run
    pre_hooks = global_hooks._global_forward_pre_hooks.items()
    replaced = [vars(m)["forward"] for m in modules if "forward" in vars(m)]
    return (
        tuple(map(id, parameters.tensors)),
        tuple(parameters.movable),
        tuple([(m.training, type(m)) for m in modules]),
        tuple([(id(forward), getattr(forward, "__code__", None)) for forward in replaced]),  # none keeps a module alive
        (*global_hooks._global_forward_hooks, *[n for n, hook in pre_hooks if getattr(hook, "__func__", 0) is not own]),
        tuple(torch.is_autocast_enabled(d) and torch.get_autocast_dtype(d) for d in ("cpu", "cuda")),
        tuple([hooks for m in modules if (hooks := (*m._forward_hooks, *m._forward_pre_hooks))]),
        any([m._backward_hooks or m._backward_pre_hooks or m._compiled_call_impl for m in modules]),  # noqa: C419
        _global_hooks(),
        any(map(_has_hooks, parameters.tensors)),
        fingerprint(getattr(batch.loss, "criterion", batch.loss)),
    )


def fingerprint(loss: Any, depth: int = 2) -> Any:
    """Return what tells one loss from another, equal for a function that is made anew at every step.

    Of a function that is its code and the variables that it reads, of an object its attributes, of a module the modes
    of all modules inside. Of a number, which may change from step to step, it is whether it is zero: a term may be
    switched on by it. Of a tensor it is the type.
    """
    if loss is None or isinstance(loss, bool | str):
        return loss
    if isinstance(loss, int | float):
        return type(loss), loss == 0
    if isinstance(loss, Tensor) or depth == 0:
        return type(loss)
    if isinstance(loss, MethodType):
        return fingerprint(loss.__func__, depth), fingerprint(loss.__self__, depth)
    if isinstance(loss, FunctionType):
        shared = map(loss.__globals__.get, loss.__code__.co_names)
        held = [*map(_content, loss.__closure__ or ()), *(loss.__defaults__ or ())]
        held += [v for v in shared if isinstance(v, bool | int | float | str | FunctionType)]
        return (loss.__code__, *[fingerprint(v, depth - 1) for v in held])
    if isinstance(loss, partial):
        held = [loss.func, *loss.args, *loss.keywords.values()]
    elif isinstance(loss, nn.Module):
        held = [m.training for m in loss.modules()] + [v for k, v in vars(loss).items() if k[0] != "_"]
    else:
        held = list(getattr(loss, "__dict__", {}).values())
    return (type(loss), *[fingerprint(v, depth - 1) for v in held])


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None
