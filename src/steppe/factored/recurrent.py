"""Recurrent networks: each micro-batch runs the torch function with its own copy of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steppe.factored.microbatches import MicroBatches
from steppe.factored.passes import Interception, Matrices, Site, Small
from steppe.factored.tracked import CannotFactor


class Recurrent:
    """``torch.lstm``, ``gru`` and ``rnn_tanh``, which ``vmap`` cannot run, in a loop over micro-batches."""

    def run(
        self, passing: Interception, func: Any, input: Tensor, hidden: Any, weights: Any, *options: Any
    ) -> tuple[Tensor, ...] | Any:
        """Return the outputs, and the last states of all layers."""
        if passing.tracked.first_in((weights, *options)) is None:
            return NotImplemented
        index = [passing.tracked.index(p) for p in weights]
        if not isinstance(options[0], bool):
            raise CannotFactor("a recurrent network over packed sequences has no factored form")
        parts = passing.parts or MicroBatches(passing.tracked.n, 1)
        examples = 0 if options[-1] else 1  # the last option is batch_first
        if input.dim() != 3 or input.shape[examples] != parts.n:
            raise CannotFactor("a recurrent network whose examples are not along its batch dimension")
        own = [
            None if i is None else passing.copies_by_part(self, p, i, parts)
            for p, i in zip(weights, index, strict=True)
        ]
        made = []
        states = hidden if isinstance(hidden, tuple | list) else (hidden,)
        for k, start in enumerate(parts.starts):
            size = min(parts.m, parts.n - start)
            given = [h.narrow(1, start, size).contiguous() for h in states]
            mine = [p if copy is None else copy[k] for p, copy in zip(weights, own, strict=True)]
            x = input.narrow(examples, start, size)
            made.append(func(x, tuple(given) if isinstance(hidden, tuple | list) else given[0], mine, *options))
        outputs, *last = zip(*made, strict=True)
        return (torch.cat(outputs, examples), *(torch.cat(h, 1) for h in last))

    record = evaluate = run

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add nothing: the gradients of the copies are those of the micro-batches."""
