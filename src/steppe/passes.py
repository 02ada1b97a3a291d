"""What surrounds every pass of a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from steppe.point import Point
from steppe.replay import RandomState, frozen_statistics
from steppe.vector import Vector


class Passes:
    """The passes of one step over one batch.

    The first pass at ``w`` is an ordinary one; every other pass draws the same numbers from torch's generators
    (Python's and NumPy's go on) and leaves normalisation statistics as they were.

    Args:
        point: the parameters.
        modules: those that may run; others are found by a hook.
    """

    def __init__(self, point: Point, modules: Callable[[], Iterable[nn.Module]]) -> None:
        self.point, self.modules = point, modules
        self.counted = False  # whether the statistics have seen the batch
        self._random: tuple[RandomState, RandomState] | None = None  # before and after the first pass

    @contextmanager
    def one(self, away: bool) -> Iterator[None]:
        """Around a pass, at ``w`` or away from it. Gradients are dropped before and after."""
        self.drop()
        torch.clear_autocast_cache()  # weights may have moved, or a forward without gradients have cast them
        devices = self.point.devices
        start, end = self._random or (RandomState.now(devices), None)
        if end is not None:
            start.restore()
        try:
            if self.counted or away:
                with frozen_statistics(self.modules()), torch.enable_grad():
                    yield
            else:
                with torch.enable_grad():
                    yield
                self.counted = True
        finally:
            self.drop()
            if end is not None:
                end.restore()  # the stream goes on as after one ordinary pass
        self._random = (start, end or RandomState.now(devices))

    def rewind(self) -> None:
        """As if no pass had been."""
        if self._random is not None:
            self._random[0].restore()
            self._random = None

    def forget_unsharded(self) -> None:
        """Whole parameters that ``fully_shard`` has gathered are of other weights than those of the next pass."""
        if self.point.sharded:
            reshard(self.modules())

    def take(self) -> Vector:
        """The gradients, out of reach of the next pass."""
        return Vector([_take(p) for p in self.point.parameters])

    @contextmanager
    def only(self, wrt: Sequence[bool] | None) -> Iterator[None]:
        """Freeze the parameters where ``wrt`` is false, so that their backward is saved."""
        left_out = [] if wrt is None else [p for p, k in zip(self.point.parameters, wrt, strict=True) if not k]
        left_out = [p for p in left_out if p.requires_grad]
        for p in left_out:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in left_out:
                p.requires_grad_(True)

    def drop(self) -> None:
        """Let go of the gradients."""
        for p in self.point.parameters:
            p.grad = None


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let modules under ``fully_shard`` forget the whole parameters that a forward without a backward left behind."""
    for module in modules:
        let_go = getattr(module, "reshard", None)
        if callable(let_go):
            let_go()


def _take(p: Tensor) -> Tensor | None:
    g, p.grad = p.grad, None
    if g is None:
        return None
    if g.is_sparse:
        raise TypeError("steppe needs dense gradients, got a sparse one: use nn.Embedding(sparse=False)")
    storage = g.untyped_storage()
    shared = torch._C._storage_Use_Count(storage._cdata) > 2  # more than g and `storage`: a bucket, as under DDP
    return g.detach().clone() if shared else g.detach()
