"""What a rehearsal holds still: random numbers, rounding, and weights of zero.

Shared passes draw once for the whole batch, and the serial loop for every micro-batch: the same distribution, other
numbers. To compare the two, dropout is turned off, and all other draws of the whole batch (drop path, noise on
activations) are recorded, and cut where a micro-batch asks for its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

from steppe.batch import Batch, Loss
from steppe.engine.nested import Data, mapped
from steppe.engine.replay import RandomState
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
FACTORS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, torch.lerp, Tensor.lerp}
CASTS = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16, Tensor.float: torch.float32}
ATTENTION = inspect.signature(F.multi_head_attention_forward)
RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # their sixth argument is a probability
DROPPING = {F.scaled_dot_product_attention, F.multi_head_attention_forward, *RECURRENT}  # dropout inside


class Draws(Mode):
    """Turns dropout off, records the other random numbers of passes over a batch, and replays them for a part of it.

    A factor of zero without examples, such as the weight of a term that is switched on later, is 0.1 here.

    Args:
        n: the number of examples in the batch.
        m: that in a micro-batch.
        random: the random numbers that each pass over the whole batch draws, so that all take the same path.

    Attributes:
        for_all: whether numbers were drawn for the whole batch, such as whether to drop a layer.
    """

    def __init__(self, n: int, m: int, random: RandomState) -> None:
        super().__init__()
        self.n, self.random, self.for_all = n, random, False
        self.sizes, self.inside = {n, m, n % m}, False  # the forward pass, where it has begun
        self.made: list[Tensor] = []  # by the last pass over the whole batch, in order
        self.part: slice | None = None  # the examples of the pass; ``None`` for all

    def begin(self, part: slice | None = None) -> None:
        """Begin a pass over the whole batch, or over a part of it, which draws what it has drawn in the whole batch."""
        self.part, self.count, self.inside = part, 0, True
        if part is None:
            self.made.clear()
            self.random.restore()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.part is None and (func in DROPOUTS or func in DROPPING):
            self._draw(func, args, kwargs)
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in FACTORS and (self.inside or self.recomputing) and peek_interpreter_stack() is None:
            args = tuple([a if i == 0 and func is Tensor.mul_ else self._switched_on(a) for i, a in enumerate(args)])
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

    def _switched_on(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.requires_grad or not t.is_floating_point():
            return t
        of_examples = t.dim() > 0 and len(t) in self.sizes
        return t if of_examples or t.any() else t + 0.1

    def _draw(self, func: Any, args: Any, kwargs: Any) -> None:
        """Draw what dropout draws in a step: then what follows draws, and decides, as in the step."""
        args, kwargs = mapped(lambda t: t.detach().clone(), (args, kwargs))
        with torch.no_grad():
            func(*args, **kwargs)

    def _drawn(self, t: Tensor) -> Tensor:
        if self.part is None:
            if not self.recomputing:  # torch restores its generators there
                self.made.append(t.detach().clone())
            return t
        if self.count >= len(self.made):
            raise CannotFactor("a micro-batch by itself draws other random numbers than in its batch")
        made = self.made[self.count]
        self.for_all |= made.shape == t.shape and self.part.stop - self.part.start < self.n
        piece = _cut(made, t.shape, self.n, self.part)
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


class _Wider(Mode):
    """Runs a model in a wider dtype: casts what torch functions take and return. It has to be the innermost mode.

    Attributes:
        narrow: the dtypes that are cast.
        wide: the dtype that they are cast to.
        copies: by id, what stands for a parameter.
    """

    narrow: Set[torch.dtype]
    wide: torch.dtype
    copies: Mapping[int, Tensor]

    def copy(self, p: Tensor) -> Tensor:
        """Return what stands for a parameter."""
        return self.copies.get(id(p), p)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cast: list[Tensor] = []
        if CASTS.get(func) in self.narrow:
            func, args = Tensor.to, (*args[:1], self.wide)
        made = func(*self._wide(args, cast), **self._wide(kwargs or {}, cast))
        if any(t._version for t in cast):
            raise CannotFactor("a tensor that is changed in place is not cast")
        return self._wide(made, [])

    def _wide(self, a: Any, cast: list[Tensor]) -> Any:
        if isinstance(a, Tensor):
            known = self.copies.get(id(a))
            if known is None and a.dtype in self.narrow:
                known = a.to(self.wide)
                cast.append(known)
            return a if known is None else known
        if isinstance(a, dict):
            return {key: self._wide(value, cast) for key, value in a.items()}
        if type(a) in (tuple, list):
            return type(a)([self._wide(value, cast) for value in a])
        return self.wide if isinstance(a, torch.dtype) and a in self.narrow else a


class InFloat32(_Wider):
    """Runs a model in float32 that runs in low precision by itself.

    Autocast is off, and parameters of low precision are replaced by copies.

    Args:
        parameters: those to copy, where they have low precision.
    """

    narrow, wide = LOW, torch.float32

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        low = [p for p in parameters if p.dtype in LOW]
        self.copies = {id(p): p.detach().float().requires_grad_(p.requires_grad) for p in low}
        self.devices = {"cpu", *(p.device.type for p in parameters)}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        enabled = [d for d in self.devices if torch.is_autocast_enabled(d)]
        for device in enabled:
            torch.set_autocast_enabled(device, False)
        try:
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            for device in enabled:
                torch.set_autocast_enabled(device, True)


class InFloat64(_Wider):
    """Runs a copy of a model and its batch in float64, where rounding hardly ever moves a unit across a ReLU's kink.

    Attributes:
        batch: the batch of the copies; its loss is the same, and what that holds, such as class weights, is cast.

    Raises:
        CannotFactor: the model has more than ``LARGEST`` numbers, or copying it would talk to other processes.
    """

    narrow, wide = {torch.float32, *LOW}, torch.float64

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        wraps = torch.nn.parallel.DistributedDataParallel
        model = batch.model.module if isinstance(batch.model, wraps) else batch.model
        if sum(p.numel() for p in model.parameters()) > LARGEST or any(isinstance(m, wraps) for m in model.modules()):
            raise CannotFactor("the model is not copied")
        self.batch, made = copy(batch), dict[int, Any]()
        self.batch.model = deepcopy(model, made).double()
        self.copies = {id(p): made[id(p)] for p in model.parameters()}
        self.batch.data = mapped(lambda t: t.double() if t.is_floating_point() else t, batch.data)


Exact = InFloat32 | InFloat64


@dataclass
class Heard:
    """A loss times a number, which keeps what it returns, and draws for a part what is drawn for it in the batch."""

    loss: Loss
    scale: float
    draws: Draws
    exact: Exact | None
    part: slice | None = None  # the examples of the part
    losses: list[Tensor] = field(default_factory=list)

    def __call__(self, model: nn.Module, data: Data) -> Tensor:
        """Return the losses."""
        self.draws.begin(self.part)
        with self.exact or nullcontext():
            made = self.loss(model, data) * self.scale
        self.draws.inside = False
        self.losses.append(made.detach())
        return made


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
