"""What a rehearsal holds still: random numbers, rounding, and weights of zero.

Shared passes draw once for the whole batch, and the serial loop for every micro-batch: the same distribution, other
numbers. To compare the two, dropout is turned off, and all other draws of the whole batch (drop path, noise on
activations) are recorded, and cut where a micro-batch asks for its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy, deepcopy
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from steppe.batch import Batch
from steppe.engine.nested import mapped
from steppe.engine.vector import LOW
from steppe.factored.sites import CannotFactor, Mode

LARGEST = 100_000_000  # numbers of a model that is copied
DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
RANDOM = {
    *(torch.rand, torch.randn, torch.randint, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.bernoulli, torch.normal, torch.poisson, torch.multinomial, Tensor.bernoulli, Tensor.multinomial),
    *(Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_),
    *(Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_),
}
ATTENTION = inspect.signature(F.multi_head_attention_forward)
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # their sixth argument is a probability


class Draws(Mode):
    """Turns dropout off, records the other random numbers of passes over a batch, and replays them for a part of it.

    Args:
        n: the number of examples in the batch.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.made: list[Tensor] = []  # by the last pass over the whole batch, in order
        self.part: slice | None = None  # the examples of the pass; ``None`` for all

    def begin(self, part: slice | None = None) -> None:
        """Begin a pass over the whole batch, or over a part of it, which draws what it has drawn in the whole batch."""
        self.part, self.count = part, 0
        if part is None:
            self.made.clear()

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
        made = func(*args, **kwargs)
        return self._drawn(made) if func in RANDOM else made

    def _drawn(self, t: Tensor) -> Tensor:
        if self.part is None:
            if not self.recomputing:  # torch restores its generators there
                self.made.append(t.detach().clone())
            return t
        if self.count >= len(self.made):
            raise CannotFactor("a micro-batch by itself draws other random numbers than in its batch")
        piece = _cut(self.made[self.count], t.shape, self.n, self.part)
        self.count += 1
        with torch.no_grad():
            return t.copy_(piece)


def _cut(t: Tensor, shape: torch.Size, n: int, part: slice) -> Tensor:
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


class InFloat32(Mode):
    """Runs a model in float32 that runs in low precision by itself.

    Autocast is off, tensors of low precision are cast before each torch function, and parameters are replaced by
    copies. It has to be the innermost mode.

    Args:
        parameters: those to copy, where they have low precision.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        low = [p for p in parameters if p.dtype in LOW]
        self.copies = {id(p): p.detach().float().requires_grad_(p.requires_grad) for p in low}
        self.devices = {"cpu", *(p.device.type for p in parameters)}

    def copy(self, p: Tensor) -> Tensor:
        """Return what stands for a parameter."""
        return self.copies.get(id(p), p)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        enabled = [d for d in self.devices if torch.is_autocast_enabled(d)]
        for device in enabled:
            torch.set_autocast_enabled(device, False)
        try:
            func = torch.Tensor.float if func in (torch.Tensor.half, torch.Tensor.bfloat16) else func
            return func(*self._wide(args), **self._wide(kwargs or {}))
        finally:
            for device in enabled:
                torch.set_autocast_enabled(device, True)

    def _wide(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self.copies[id(a)] if id(a) in self.copies else a.float() if a.dtype in LOW else a
        if isinstance(a, dict):
            return {key: self._wide(value) for key, value in a.items()}
        if type(a) in (tuple, list):
            return type(a)(map(self._wide, a))
        return torch.float32 if isinstance(a, torch.dtype) and a in LOW else a


class InFloat64(nullcontext[None]):
    """A copy of a model and its batch in float64, where rounding hardly ever moves a unit across the kink of a ReLU.

    Attributes:
        batch: the batch of the copies; its loss is the same.

    Raises:
        CannotFactor: the model has more than ``LARGEST`` numbers, or copying it would talk to other processes.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        wraps = torch.nn.parallel.DistributedDataParallel
        model = batch.model.module if isinstance(batch.model, wraps) else batch.model
        if sum(p.numel() for p in model.parameters()) > LARGEST or any(isinstance(m, wraps) for m in model.modules()):
            raise CannotFactor("the model is not copied")
        self._copies: dict[int, Any] = {}
        self.batch = copy(batch)
        self.batch.model = deepcopy(model, self._copies).double()
        self.batch.data = mapped(lambda t: t.double() if t.is_floating_point() else t, batch.data)

    def copy(self, p: Tensor) -> Tensor:
        """Return what stands for a parameter."""
        found: Tensor = self._copies[id(p)]
        return found


@contextmanager
def no_cast(devices: Iterable[str]) -> Iterator[None]:
    """Turn off what rounds float32 outside the model too: an autocast around the step, and TF32 of an accelerator."""
    places: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn] if torch.cuda.is_available() else []
    before = [place.allow_tf32 for place in places]
    with ExitStack() as off:
        for device in devices:
            off.enter_context(torch.autocast(device, enabled=False))
        try:
            for place in places:
                place.allow_tf32 = False
            yield
        finally:
            for place, allowed in zip(places, before, strict=True):
                place.allow_tf32 = allowed


@contextmanager
def noise_added(model: nn.Module) -> Iterator[None]:
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
