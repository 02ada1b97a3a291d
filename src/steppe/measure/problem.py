"""A model's mean loss on data as a function of the weights; measuring changes nothing."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from itertools import chain
from typing import Literal, Self

import torch
from torch import Tensor, nn

from steppe.batch import Batch, Loss
from steppe.engine import checks
from steppe.engine.nested import Data, mapped
from steppe.engine.oracle import Oracle
from steppe.engine.parameters import Parameters, Radii
from steppe.engine.passes import reshard
from steppe.engine.replay import RandomState, frozen_statistics
from steppe.engine.supervised import by_example
from steppe.engine.vector import LOW, Vector, wide

Mode = Literal["eval", "train", "keep"]
RTOL = 1e-4  # two passes over the same examples agree this well, or the loss is not a function of the weights


class Problem:
    """``L(w) = 1/n sum_i f_i(w)`` over all examples of ``data``; every example counts equally, in batches of any size.

    Every pass draws the same random numbers (dropout masks, a shuffled loader), so ``L`` is one function throughout.
    After a measurement weights, gradients, buffers, the modes of all modules and torch's random state are what they
    were before, also where a pass raises.

    Where a parameter is in bfloat16 or float16, a float32 copy of the model is measured, on data in float32. It follows
    the model: every measurement is at the weights that the model has then.

    Args:
        model: the module.
        loss: a criterion module with ``reduction="none"``, such as ``nn.CrossEntropyLoss(reduction="none")``, for data
            of ``(inputs, targets)``; or a function ``(model, data) -> losses``, one loss per example, shape ``(n,)``.
        data: one batch (a tensor, or a tuple or mapping of tensors), or an iterable of batches that can be iterated
            again and again: a ``DataLoader``, a list. Batches are moved to the parameters' device.
        params: the parameters to differentiate by; ``None`` is every one that requires a gradient.
        mode: ``"eval"`` measures in evaluation mode, ``"train"`` in training mode, ``"keep"`` in each module's mode.
        batch_size: maximum number of examples in one pass through the model; ``None`` takes batches as they come.

    Raises:
        TypeError: ``loss`` is no function, or ``data`` can be iterated once only.
        ValueError: there is no parameter to differentiate by or no example; a loss is not one number per example or
            not finite; or the losses differ when they are computed twice.

    Example:
        >>> problem = Problem(model, nn.CrossEntropyLoss(reduction="none"), loader)
        >>> eigenpairs(Hessian(problem)).value
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module | Loss,
        data: Data | Iterable[Data],
        *,
        params: Iterable[Tensor] | None = None,
        mode: Mode = "eval",
        batch_size: int | None = None,
    ) -> None:
        if mode not in ("eval", "train", "keep"):
            raise ValueError(f'mode must be "eval", "train" or "keep", got {mode!r}')
        if batch_size is not None:
            checks.positive_integer("batch_size", batch_size)
        data = [data] if isinstance(data, Tensor | tuple | Mapping) else data
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise TypeError(f"data must be a batch, or batches that can be iterated again, got {type(data).__name__}")
        self.model, self.loss, self.data, self.mode, self.batch_size = model, loss, data, mode, batch_size
        self.parameters = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
        if not self.parameters or not all(p.requires_grad for p in self.parameters):
            raise ValueError("params must be at least one parameter, all of which require a gradient")
        self._original = model
        if any(p.dtype in LOW for p in self.parameters):
            self.model = deepcopy(model).float()
            copies: dict[Tensor, Tensor] = dict(zip(model.parameters(), self.model.parameters(), strict=True))
            if not all(p in copies for p in self.parameters):
                raise ValueError("params must be parameters of the model where some are in low precision")
            self.parameters = [copies[p] for p in self.parameters]
        self._point = Parameters(self.parameters, Radii([1.0] * len(self.parameters)))
        self._start = self.random_state()
        self.n = self._checked()

    def random_state(self) -> RandomState:
        """Return the state of the generators that a pass may use."""
        return RandomState.now(self._point.devices)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Set the mode inside, and put back everything that passes change on leaving."""
        if self.model is not self._original:
            self._follow()
        before = self.random_state()
        modes = [(module, module.training) for module in self.model.modules()]
        gradients = [(p, p.grad) for p in self.model.parameters()]
        try:
            if self.mode != "keep":
                self.model.train(self.mode == "train")
            with frozen_statistics(self.model.modules()), torch.enable_grad():
                yield
        finally:
            reshard(self.model.modules())
            for module, training in modes:
                module.training = training
            for p, g in gradients:
                p.grad = g
            before.restore()

    def _follow(self) -> None:
        """Give the float32 copy the weights, buffers and modes that the model has now."""
        with torch.no_grad():
            tensors = (chain(model.parameters(), model.buffers()) for model in (self.model, self._original))
            for mine, theirs in zip(*tensors, strict=True):
                mine.copy_(theirs)
        for copied, module in zip(self.model.modules(), self._original.modules(), strict=True):
            copied.training = module.training

    def batches(self) -> Iterator[Batch]:
        """Stream the data, from the same random state each time; to be used inside :meth:`untouched`."""
        self._start.restore()
        for data in self.data:
            batch = self._batch(data)
            yield from [batch] if self.batch_size is None else batch.split(self.batch_size)

    def losses(self) -> Tensor:
        """Return every example's loss at ``w``, shape ``(n,)``, detached, in the order of the data."""
        with self.untouched(), torch.no_grad():
            parts = [batch.losses().detach() for batch in self.batches()]
        if not parts:
            raise ValueError("data must hold at least one example, got no batch")
        return torch.cat(parts)

    def outputs(self, batch: Batch) -> Tensor:
        """Return the model's outputs for the inputs of a batch of ``(inputs, targets)``."""
        outputs: Tensor = self.model(batch.data[0])
        return outputs

    def criterion(self, batch: Batch, outputs: Tensor) -> Tensor:
        """Return every example's loss from the model's outputs, shape ``(n,)``; the loss must be a criterion module."""
        return by_example(self.loss(outputs, batch.data[1]))  # type: ignore[arg-type] # a criterion here

    def oracle(self, closure: Callable[[], Tensor] | None = None) -> Oracle:
        """Return the mean loss as optimizers see it, to be used inside :meth:`untouched`.

        ``closure`` is a forward and backward pass to take in place of :meth:`backward`.
        """

        def whole_pass() -> Tensor:
            with frozen_statistics(self.model.modules()):  # every pass starts from the same running statistics
                self.model.zero_grad(set_to_none=True)
                return (closure or self.backward)()

        return Oracle(whole_pass, self._point, modules=self.model.modules)

    def gradient(self) -> Vector:
        """Return the gradient of the mean loss; under DDP on the rank's own data."""
        g = Vector([None] * len(self.parameters))
        with self.untouched():
            for batch in self.batches():
                g = g + self.gradient_on(batch)
        return g / self.n

    def gradient_on(self, batch: Batch) -> Vector:
        """Return the gradient of the sum of a batch's losses; to be used inside :meth:`untouched`."""
        return Vector(torch.autograd.grad(batch.losses().sum(), self.parameters, allow_unused=True))

    def backward(self) -> Tensor:
        """Run forward and backward over all batches at the weights that the model has now; return the mean loss."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in self.batches():
            losses = batch.losses()
            (losses.sum() / self.n).backward()
            total += losses.detach().sum().to(total)
        return total / self.n

    def mean_loss(self) -> float:
        """Return the mean loss at the weights that the model has now, a forward pass; inside :meth:`untouched`."""
        with frozen_statistics(self.model.modules()), torch.no_grad():
            total = math.fsum(float(batch.losses().double().sum()) for batch in self.batches())
        reshard(self.model.modules())  # FSDP2 keeps whole weights after a forward alone: they would miss the next move
        return total / self.n

    def split(self, m: int) -> Iterator[Self]:
        """Yield problems of ``m`` examples in order, batch by batch; the last of a batch has the remainder."""
        checks.positive_integer("m", m)
        with self.untouched():
            batches = list(self.batches())
        for batch in batches:
            yield from map(self._on, batch.split(m))

    def first(self, count: int) -> Self:
        """Return the problem of the first ``count`` examples, or of all where there are fewer."""
        checks.positive_integer("count", count)
        chosen: list[Batch] = []
        with self.untouched():
            for batch in self.batches():  # no more than these: all may not fit into memory
                chosen += batch.split(count - sum(map(len, chosen)))[:1]
                if sum(map(len, chosen)) == count:
                    break
        return self._on(*chosen)

    def _on(self, *batches: Batch) -> Self:
        part = copy(self)
        part.data, part.n = [batch.data for batch in batches], sum(map(len, batches))
        return part

    def _batch(self, data: Data) -> Batch:
        device = self.parameters[0].device
        if all(p.device == device for p in self.parameters):
            data = mapped(lambda t: t.to(device), data)
        if self.model is not self._original:
            data = mapped(lambda t: wide(t) if t.dtype in LOW else t, data)
        if not isinstance(self.loss, nn.Module):
            return Batch(self.model, self.loss, data)
        if isinstance(data, tuple | list) and len(data) == 2:
            return Batch.supervised(self.model, self.loss, *data)
        raise ValueError("data must be (inputs, targets) where loss is a criterion; else pass a function as loss")

    def _checked(self) -> int:
        """Compute every loss twice, refuse what is no function of the weights, and return the number of examples."""
        first, second = self.losses(), self.losses()
        if bad := int((~first.isfinite()).sum()):
            raise ValueError(f"loss must be finite at w, got {bad} of {len(first)} losses that are not")
        if first.shape != second.shape or not torch.allclose(first.sort()[0], second.sort()[0], RTOL, RTOL):
            raise ValueError(
                "loss must be the same each time it is computed, but two passes over the data differ: does the data "
                "change (augmentation, a loader with its own generator), or does the model?"
            )
        return len(first)
