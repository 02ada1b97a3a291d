"""Models that many tests share: a small network, one that fails, one with branches, one with dropout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

How = float | BaseException | Callable[[int], BaseException]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


class Faulty(nn.Module):
    """A network of which chosen forwards fail.

    ``fail_at`` holds the calls that fail, counted from 1, or says of the inputs and the call whether it fails.
    ``how`` is an exception, which is raised after the forward; a function that makes one of the call's number; or a
    number, by which the output is multiplied. ``seen`` counts examples, as running statistics would.
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        fail_at: Collection[int] | Callable[[Tensor, int], bool] = (),
        how: How = torch.nan,
    ) -> None:
        super().__init__()
        self.net, self.calls, self.fail_at, self.how = mlp() if net is None else net, 0, fail_at, how
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        fails = self.fail_at(x, self.calls) if callable(self.fail_at) else self.calls in self.fail_at
        number = isinstance(self.how, int | float)
        out = self.net(x) * (self.how if fails and number else 1.0)  # the same operations, failing or not
        if fails and not number:
            raise self.how if isinstance(self.how, BaseException) else self.how(self.calls)
        return out


class Branches(nn.Module):
    """A sum of branches, of which a forward takes some alone, as with dropped layers and experts.

    ``pattern`` holds the branches of one forward after the other, and starts anew at its end.
    """

    def __init__(
        self, branches: Sequence[nn.Module], body: nn.Module | None = None, pattern: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__()
        self.body = nn.Identity() if body is None else body
        self.branches = nn.ModuleList(branches)
        self.pattern, self.calls = pattern or [range(len(branches))], 0

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.pattern[self.calls % len(self.pattern)]
        self.calls += 1
        h = self.body(x)
        return sum(self.branches[i](h) for i in chosen)


class Dropout(nn.Module):
    """Two layers with dropout between; ``masks`` holds those that were drawn, ``seen`` counts examples."""

    def __init__(self, width: int = 40, between: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.head, self.masks = nn.Linear(5, width), nn.Linear(width, 3), []
        self.between = nn.Identity() if between is None else between
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.functional.dropout(torch.ones(len(x), self.head.in_features, dtype=x.dtype), 0.5)
        self.masks.append(mask)
        self.seen = self.seen + len(x)
        return self.head(self.between(self.net(x)) * mask)
