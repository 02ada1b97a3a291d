"""``DistributedDataParallel``: whose gradients make the perturbation, and what is averaged over the ranks."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from steppe.engine import checks
from steppe.engine.replay import is_compiled
from steppe.engine.update import Update
from steppe.engine.vector import Vector, is_sharded, wide

T = TypeVar("T")
Sync = str | int  # "auto", "local", "global", or how many neighbouring ranks share a perturbation

BUCKET = 2**23  # numbers in one message: 32 MB of float32


def distributed_run() -> bool:
    """Tell whether this process is one of a process group."""
    return distributed.is_available() and distributed.is_initialized()


@dataclass
class Ranks:
    """One step's replicas under ``DistributedDataParallel``; a no-op in a single process.

    Args:
        replicas: the DDP modules of the step.
        shared: whether every gradient is averaged over all ranks (``sync="global"``).
        group: the ranks that share a perturbation, where they are some (``sync=n``).
        averaged: whether the update is made of averages over all ranks already.
        unprepared: whether DDP (``static_graph=True``) still needs a first averaged pass to record its graph.
        begun: whether a forward has taken part in DDP's broadcast of buffers, as one does in ordinary training.
    """

    replicas: Sequence[Any] = ()
    shared: bool = False
    group: Any = None
    averaged: bool = False
    begun: bool = False
    unprepared: bool = False

    @property
    def alone(self) -> bool:
        """True outside DDP."""
        return not self.replicas

    def stay_within(self) -> None:
        """Average only the update from here on: micro-batches lie within a rank."""
        self.shared, self.group, self.averaged = False, None, False

    @contextmanager
    def within(self) -> Iterator[None]:
        """Surround passes whose gradients are not shared with other ranks."""
        kept = self.shared, self.group, self.averaged
        self.stay_within()
        try:
            yield
        finally:
            self.shared, self.group, self.averaged = kept

    @contextmanager
    def passing(self, synced: bool) -> Iterator[None]:
        """Surround a forward and its backward: DDP averages the gradients if ``synced``."""
        broadcast, self.begun = not self.begun, True
        with nullcontext() if synced else self.apart():
            self._broadcast_buffers(broadcast)
            try:
                yield
            finally:
                self._broadcast_buffers(True)  # as a step of ordinary training leaves it: evaluation comes next

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Surround passes in which no rank waits for another (``no_sync``)."""
        with ExitStack() as stack:
            for replica in self.replicas:
                stack.enter_context(replica.no_sync())
                stack.callback(replica.register_forward_pre_hook(_stay_apart).remove)
            self._broadcast_buffers(False)
            try:
                yield
            finally:
                self._broadcast_buffers(True)

    def _broadcast_buffers(self, broadcast: bool) -> None:
        """Set whether the next forward takes the buffers of the first rank."""
        for replica in self.replicas:
            replica.require_forward_param_sync = broadcast

    def shared_gradient(self, g: Vector, like: Sequence[Tensor]) -> Vector:
        """Return ``g`` as the ranks share it, where DDP has not averaged it in the backward pass."""
        if self.shared:
            return self.mean(g, like)
        return g if self.group is None else self._means([g], like, self.group)[0]

    def mean(self, g: Vector, like: Sequence[Tensor]) -> Vector:
        """Return the mean over all ranks."""
        return self._means([g], like, self.replicas[0].process_group)[0]

    def mean_number(self, x: Tensor | float) -> Tensor | float:
        """Return the mean of a number over all ranks."""
        if self.alone:
            return x
        device = next(self.replicas[0].parameters()).device
        return _mean_(torch.as_tensor(x, dtype=torch.float64, device=device).clone(), self.replicas[0].process_group)

    def shared_mean(self, x: Tensor, sharded: bool) -> Tensor:
        """Return the mean over the ranks that share gradients, or parameters, so that all choose alike."""
        group = self.replicas[0].process_group if self.shared else self.group
        return x if group is None and not sharded else _mean_(x.clone(), group)

    def agreed(self, value: T | None, device: torch.device) -> T | None:
        """Return ``value``, or ``None`` where any rank that shares gradients has none, so that all go the same way."""
        if not self.shared and self.group is None:
            return value
        return None if self.any(value is None, device) else value

    def any(self, flag: bool, device: torch.device) -> bool:
        """Tell whether the flag is set on any rank."""
        if self.alone:
            return flag
        flags = torch.full((1,), int(flag), device=device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self.replicas[0].process_group)
        return bool(flags)

    def join(
        self, update: Update, memory: dict[str, Vector], like: Sequence[Tensor]
    ) -> tuple[Update, dict[str, Vector]]:
        """Return the mean of all ranks' updates and memories, so that replicas and checkpoints stay equal."""
        if self.alone:
            return update, memory
        names = sorted(memory)
        nothing = Vector([None] * len(like))  # on this rank: another may move beside the base
        vectors = [] if self.averaged else [update.grad, update.beside or nothing]
        if not self.shared:
            vectors += [memory[name] for name in names]
        means = self._means(vectors, like, self.replicas[0].process_group)
        if not self.shared:
            memory = dict(zip(names, means[len(means) - len(names) :], strict=True))
        if not self.averaged:
            update = Update(means[0], means[1] if means[1].present() else None)
        return update, memory

    def _means(self, vectors: Sequence[Vector], like: Sequence[Tensor], group: Any) -> list[Vector]:
        """Return means over a group. An entry that a rank lacks is zero there; one that all lack is ``None``.

        In at least float32: whether an entry has been widened already may differ from rank to rank.
        """
        if not vectors:
            return []
        entries = [t for v in vectors for t in v.materialised()]
        present = torch.tensor([t is not None for t in entries], dtype=torch.uint8, device=like[0].device)
        distributed.all_reduce(present, distributed.ReduceOp.MAX, group=group)
        shapes = [p for _ in vectors for p in like]
        kept = [
            wide(torch.zeros_like(p) if t is None else t) if there else None
            for t, p, there in zip(entries, shapes, present.tolist(), strict=True)
        ]
        averaged = iter(_averaged([t for t in kept if t is not None], group))
        means = [None if t is None else next(averaged) for t in kept]
        return [Vector(means[i : i + len(like)]) for i in range(0, len(means), len(like))]


def _stay_apart(replica: Any, _inputs: Any) -> None:
    """Undo ``model.require_backward_grad_sync = True``, which closures that accumulate write, in a pass apart."""
    replica.require_backward_grad_sync = False


@contextmanager
def no_unknown_replica(known: Iterable[nn.Module]) -> Iterator[None]:
    """Refuse a DDP model that runs inside: its gradients would be averaged in the wrong passes.

    Args:
        known: the modules of the closure, none of which is a replica.

    Raises:
        RuntimeError: before the model's forward.
    """

    def refuse(module: nn.Module, _inputs: Any) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                "the closure runs a DistributedDataParallel model that is not among the variables it refers to: "
                "pass model= to the optimizer"
            )

    compiled = any(map(is_compiled, known))  # torch warns of hooks on compiled modules
    hook = None if compiled else register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _mean_(t: Tensor, group: Any) -> Tensor:
    """Replace a tensor by its mean over a group, ``None`` for all ranks."""
    distributed.all_reduce(t, group=group)
    return t.div_(distributed.get_world_size(group))


def _averaged(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Return the means over the group, by all-reduces of at most ``BUCKET`` numbers."""
    buckets: dict[tuple[torch.device, torch.dtype], list[list[int]]] = {}
    for i, t in enumerate(tensors):
        kind = buckets.setdefault((t.device, t.dtype), [[]])
        if sum(tensors[j].numel() for j in kind[-1]) + t.numel() > BUCKET and kind[-1]:
            kind.append([])
        kind[-1].append(i)
    means: list[Tensor] = list(tensors)
    for indices in (bucket for kind in buckets.values() for bucket in kind):
        flat = torch.cat([tensors[i].reshape(-1) for i in indices])
        pieces = _mean_(flat, group).split([tensors[i].numel() for i in indices])
        for i, piece in zip(indices, pieces, strict=True):
            means[i] = piece.view(tensors[i].shape)
    return means


class RankGroups:
    """The ranks of an optimizer's steps: found anew for each, groups of neighbours made once."""

    def __init__(self, sync: Sync) -> None:
        if sync not in ("auto", "local", "global"):
            checks.positive_integer("sync", sync, "'auto', 'local', 'global' or a positive number of ranks")
        self.sync = sync
        self._group: Any = None
        self._prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def of_step(self, modules: Callable[[], Iterable[nn.Module]], parameters: Sequence[Tensor]) -> Ranks:
        """Return the ranks of this step.

        Raises:
            TypeError: the model is flattened by FullyShardedDataParallel.
            ValueError: ``sync`` is no choice for parameters that are sharded, or does not divide the ranks.
            RuntimeError: inside ``join()``.
        """
        if not distributed_run():
            return Ranks()
        if any(map(is_sharded, parameters)):
            if self.sync not in ("auto", "global"):
                raise ValueError(
                    f"sync must be 'auto' or 'global' for sharded parameters, got {self.sync!r}: "
                    "their gradients are averaged in every backward pass, so all ranks share one perturbation"
                )
            return Ranks()
        found = list({id(m): m for m in modules()}.values())
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in found):
            raise TypeError(checks.FSDP1)
        replicas = [m for m in found if isinstance(m, nn.parallel.DistributedDataParallel)]
        if not replicas:
            return Ranks()
        if any(replica._join_config.enable for replica in replicas):
            raise RuntimeError(
                "a step cannot run inside DDP's join(): a rank without data does not know how many passes the others "
                "take. Give every rank as many batches (DistributedSampler does, and drop_last=True)"
            )
        if self.sync == "global":
            return Ranks(replicas, shared=True, averaged=True)
        group = self._neighbours(replicas[0].process_group)
        unprepared = {r for r in replicas if r.static_graph} - set(self._prepared)
        self._prepared |= unprepared
        return Ranks(replicas, group=group, unprepared=bool(unprepared))

    def _neighbours(self, group: Any) -> Any:
        if isinstance(self.sync, str) or self.sync == 1:
            return None
        if self._group is None:
            n = distributed.get_world_size(group)
            if n % self.sync:
                raise ValueError(f"sync must divide the number of ranks, {n}, got {self.sync}")
            if n != distributed.get_world_size():
                raise ValueError("sync must be 'local' or 'global' where the replicas are not all ranks")
            self._group, _ = distributed.new_subgroups(group_size=self.sync)
        return self._group

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return RankGroups, (self.sync,)  # groups are of these processes
