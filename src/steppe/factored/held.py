"""What a model and its loss keep from pass to pass, outside parameters and buffers: attributes."""

from __future__ import annotations

from collections import deque
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine.replay import frozen_statistics
from steppe.factored.sites import CannotFactor

CONTAINERS = list, dict, deque
OWN = vars(nn.Module()).keys()  # parameters, modules, hooks


class Held:
    """The numbers, tensors and containers in attributes of a batch's modules, its loss and the loss's criterion.

    They are counters, running values, queues; the passes of a rehearsal may not advance them.
    """

    def __init__(self, batch: Batch) -> None:
        owners = [*batch.modules(), *of_loss(batch)]
        self.owners: list[dict[str, Any]] = [vars(owner) for owner in owners if hasattr(owner, "__dict__")]
        self.before = [{k: (v, _copy(v)) for k, v in own.items() if k not in OWN and _keeps(v)} for own in self.owners]

    def restore(self) -> None:
        """Put everything back."""
        for own, before in zip(self.owners, self.before, strict=True):
            for name, (value, saved) in before.items():
                if name not in own:  # what was None is a module now
                    continue
                own[name] = value
                if isinstance(value, CONTAINERS):
                    value.clear()
                    (value.update if isinstance(value, dict) else value.extend)(saved)
                elif isinstance(value, Tensor) and not _equal(value, saved):
                    with torch.no_grad():
                        value.copy_(saved)

    def advance(self) -> list[str]:
        """Change the numbers and tensors that passes have changed, as many more passes would; return their names."""
        names = []
        for own, before in zip(self.owners, self.before, strict=True):
            for name, (value, saved) in before.items():
                now: Any = own.get(name)
                if type(now) is not type(value) or isinstance(now, CONTAINERS) or _equal(now, saved):
                    continue
                if not isinstance(now, Tensor):
                    own[name] = now + 1_000_000
                elif now.is_floating_point():
                    own[name] = now + 1 + now.detach().abs().mean()
                names.append(name)
        return names


def of_loss(batch: Batch) -> list[Any]:
    """Return the loss, what it is a method of, its criterion, and the modules inside them."""
    loss = getattr(batch.loss, "__self__", batch.loss)
    criterion = getattr(loss, "criterion", loss)
    both = [loss] if criterion is loss else [loss, criterion]
    return [inner for one in both for inner in (one.modules() if isinstance(one, nn.Module) else [one])]


def _keeps(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.requires_grad and value.layout == torch.strided and not isinstance(value, nn.Parameter)
    return type(value) in (int, float, *CONTAINERS)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return copy(value) if isinstance(value, CONTAINERS) else value


def _equal(a: Any, b: Any) -> bool:
    return bool(a.shape == b.shape and torch.equal(a, b) if isinstance(a, Tensor) else a == b)


def first_forward(batch: Batch, m: int | None) -> None:
    """Run the first micro-batch, for what a model does in its first forward alone, such as to note its weights.

    Raises:
        CannotFactor: the forward pass writes to a parameter.
    """
    named = dict(batch.model.named_parameters())
    before = {name: (p._version, p.data_ptr()) for name, p in named.items()}
    with frozen_statistics(batch.modules()), torch.enable_grad():
        batch.split(m or len(batch))[0].losses()
    for name, p in named.items():
        if (p._version, p.data_ptr()) != before[name]:
            raise CannotFactor(f"{name} is written to in the forward pass")
