"""Random numbers of a model, so that a micro-batch by itself draws those that it has in the whole batch.

Shared passes draw once for the whole batch, and the serial loop for every micro-batch: the same distribution, other
numbers. To compare the two, dropout is turned off, and all other draws of the whole batch (drop path, noise on
activations) are recorded, and cut where a micro-batch asks for its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from steppe.factored.tracked import CannotFactor

DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
NEW = {
    *(torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.bernoulli, torch.normal, torch.poisson, torch.multinomial, Tensor.bernoulli, Tensor.multinomial),
}  # functions that return random numbers
IN_PLACE = {
    *(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_),
    *(Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_),
}  # methods that fill a tensor with random numbers
ATTENTION = inspect.signature(F.multi_head_attention_forward)
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # their sixth argument is a probability


class Draws(TorchFunctionMode):
    """Turns dropout off, records the other random numbers of passes over a batch, and replays them for a part of it.

    Args:
        n: the number of examples in the batch.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.made: list[Tensor] = []  # by the last pass over the whole batch, in order
        self.part: slice | None = None  # the examples of the pass; ``None`` for all
        self.count = 0  # of the draws of this pass so far
        self.recomputing = False  # whether activation checkpointing runs a part of it again

    def begin(self, part: slice | None = None) -> None:
        """Begin a pass over the whole batch, or over a part of it, which draws what it has drawn in the whole batch."""
        self.part, self.count = part, 0
        if part is None:
            self.made.clear()

    def place(self) -> int:
        """Return where the pass is, for :meth:`again`."""
        return self.count

    @contextmanager
    def again(self, place: int) -> Iterator[None]:
        """Surround what activation checkpointing computes again from a place on: it draws the same numbers."""
        before, self.count, self.recomputing = self.count, place, True
        active = self in _get_current_function_mode_stack()  # not in a backward pass that itself is intercepted
        try:
            with nullcontext() if active else self:
                yield
        finally:
            self.count, self.recomputing = before, False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        elif func is F.multi_head_attention_forward:
            kwargs = ATTENTION.bind(*args, **kwargs).arguments | {"training": False}
            args = ()
        elif func in RECURRENT:
            at = 5 if isinstance(args[3], bool) else 6  # packed sequences have another order
            args = (*args[:at], 0.0, *args[at + 1 :]) if len(args) > at else args
        elif func in NEW or func in IN_PLACE:
            return self._drawn(func, args, kwargs)
        return func(*args, **kwargs)

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        t: Tensor = func(*args, **kwargs)
        if self.part is None:
            if not self.recomputing:  # torch restores its generators there
                self.made.append(t.detach().clone())
            return t
        if self.count >= len(self.made):
            raise CannotFactor("a micro-batch by itself draws other random numbers than in its batch")
        piece = cut(self.made[self.count], t.shape, self.n, self.part)
        self.count += 1
        with torch.no_grad():
            return t.copy_(piece)


def cut(t: Tensor, shape: torch.Size, n: int, part: slice) -> Tensor:
    """Return the random numbers of a part of the examples, in the shape that the part asks for.

    Raises:
        CannotFactor: they are drawn neither for each example nor for the whole batch.
    """
    examples = part.stop - part.start
    if t.shape == shape:  # a number for the whole batch, such as whether to drop a layer: all micro-batches share it
        return t
    differing = [d for d, (a, b) in enumerate(zip(t.shape, shape, strict=False)) if a != b]
    d = differing[0] if t.dim() == len(shape) and len(differing) == 1 else None
    if d is None or t.shape[d] % n or t.shape[d] // n * examples != shape[d]:
        raise CannotFactor("random numbers are not drawn example by example")
    rows = t.unflatten(d, (n, -1)).narrow(d, part.start, examples)
    made: Tensor = rows.flatten(d, d + 1)
    return made
