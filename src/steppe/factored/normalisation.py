"""Normalisation: scale and shift of each example or micro-batch, and batch statistics of each micro-batch.

Layer, RMS, group and instance normalisation treat each example by itself: ``y = normalised(x) w + b``, where ``w`` and
``b`` are small, so each example gets a copy, whose gradients are ``sum delta normalised(x)`` and ``sum delta``.

Batch normalisation runs in one pass over the whole batch, each micro-batch by its own statistics. For the values ``x``
of a channel in micro-batch ``k``, ``y = (x - mean_k) r_k w + b`` with ``r_k = 1 / sqrt(var_k + eps)`` (Ioffe and
Szegedy 2015, arXiv 1502.03167). The gradients are those of the paper, for each micro-batch: with ``c = x - mean_k`` and
``N`` values, ``db_k = sum d``, ``dw_k = r_k sum(d c)`` and ``dx = r_k w (d - db_k / N - c r_k dw_k / N)``. So both
passes of m-SAM are those of the serial loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.engine.vector import wide
from steppe.factored.gradients import no_view
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import CannotFactor, Interception, Matrices, Site, Small, Unsure, collect_copies


def affine(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """Return ``x w + b``."""
    if w is None:
        return x if b is None else x + b
    return x * w if b is None else torch.addcmul(b.to(x.dtype), x, w.to(x.dtype))


class NormLayer:
    """Layer, RMS, instance and batch normalisation: ``y = normalised(x) w + b``.

    Args:
        arguments: the positions of weight and bias among the arguments of the function.
        channels_first: whether channels are dimension 1 (instance, batch normalisation), not the last dimensions.
    """

    def __init__(self, arguments: tuple[int, int | None], channels_first: bool) -> None:
        self.arguments, self.channels_first = arguments, channels_first

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any], list[Any]]:
        """Return the arguments without scale and shift, and these two."""
        kept, rest, taken = list(args), dict(kwargs), []
        for position, name in zip(self.arguments, ("weight", "bias"), strict=True):
            value = rest.pop(name, None)
            if position is not None and position < len(kept):
                value, kept[position] = kept[position], None
            taken.append(value)
        return kept, rest, taken

    def run(self, passing: FirstPass | SecondPass, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Normalise without scale and shift, then apply those that the pass has."""
        rest, options, (w, b) = self.take(args, kwargs)
        weight, bias = passing.tracked.pair(w, b)
        if weight is None and bias is None:
            return NotImplemented
        x = func(*rest, **options)
        leading = x.shape[:1] if self.channels_first else x.shape[: x.dim() - (w if w is not None else b).dim()]
        if isinstance(passing, SecondPass):
            site = passing.next(self, weight, bias)
            w, b = (p if i is None else passing.rows_of(site, p, i, leading) for p, i in ((w, weight), (b, bias)))
        y = affine(x, self.shaped(w, x), self.shaped(b, x)).to(x.dtype)
        if isinstance(passing, SecondPass):
            return y
        return passing.watch(y, Site(self, weight, bias, None if weight is None else x.detach(), tuple(leading)))

    def shaped(self, p: Tensor | None, x: Tensor) -> Tensor | None:
        """Return a parameter, or rows of it, with the dimensions of ``x`` that follow the channels."""
        return p.reshape(*p.shape, *[1] * (x.dim() - 2)) if self.channels_first and p is not None else p

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the per-example gradients of scale, ``delta * x``, and shift, ``delta``."""
        if site.weight is not None and site.kept is not None:
            small.setdefault(site.weight, []).append(self.summed(site, site.deltas[0] * site.kept))
        if site.bias is not None:
            small.setdefault(site.bias, []).append(self.summed(site, site.deltas[0]))

    def summed(self, site: Site, t: Tensor) -> Tensor:
        """Return the sums over the rows of each example, ``(n, *shape of the parameter)``."""
        return site.sums(t.flatten(2).sum(2) if self.channels_first and t.dim() > 2 else t)


class GroupNorm:
    """``F.group_norm`` of all examples in one call, the groups of the examples side by side.

    This saves 6 to 9 % of a step on a ResNet-18 of width 16, against a scale and shift after the norm.
    """

    def run(
        self,
        passing: FirstPass | SecondPass,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Any:
        """Normalise with a copy of scale and shift for every example."""
        index = passing.tracked.pair(weight, bias)
        if index == (None, None):
            return NotImplemented
        n, channels, *size = input.shape
        w, b = passing.copies(self, scale_and_shift(input, weight, bias), index, n).unbind(1)
        x = input.reshape(1, n * channels, *size)
        return F.group_norm(x, n * num_groups, w.flatten(), b.flatten(), eps).reshape(input.shape)

    collect = staticmethod(collect_copies)


def scale_and_shift(x: Tensor, w: Tensor | None, b: Tensor | None) -> list[Tensor]:
    """Return both, or ones and zeros for each channel."""
    return [x.new_ones(x.shape[1]) if w is None else w, x.new_zeros(x.shape[1]) if b is None else b]


@dataclass
class Statistics:
    """What one call has found in each micro-batch.

    Attributes:
        running_mean: the buffer that follows the means.
        running_var: the buffer that follows the variances.
        momentum: the weight of the newest micro-batch in them.
        mean: the means, ``(k, C)``.
        var: the unbiased variances, ``(k, C)``.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float
    mean: Tensor
    var: Tensor


class BatchNorm:
    """``F.batch_norm``: by the statistics of each micro-batch, or by given ones, where it is an affine map."""

    by_given = NormLayer((3, 4), channels_first=True)

    def run(
        self,
        passing: FirstPass | SecondPass,
        func: Any,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        """Normalise, with a copy of scale and shift for every micro-batch."""
        if not training:
            given = (input, running_mean, running_var, weight, bias, False, momentum, eps)
            return self.by_given.run(passing, func, *given)
        parts = passing.parts
        if parts is None or input.shape[0] != parts.n:
            raise CannotFactor("the gradients of single examples are not defined: batch normalisation mixes examples")
        if min(m for *_, m in parts.spans) * input[0, 0].numel() == 1:
            raise Unsure("batch normalisation has one value per channel in a micro-batch")
        passing.mixes = True
        both, index = scale_and_shift(input, weight, bias), passing.tracked.pair(weight, bias)
        if index == (None, None):
            copies = torch.stack(both).expand(parts.k, -1, -1)
        else:
            copies = passing.copies(self, both, index, parts.k, parts)
        found: list[tuple[Tensor, Tensor]] = []  # means and variances
        chunks = zip(parts.spans, parts.split(copies), strict=True)
        made = [Normalise.apply(input[first:last], c, eps, found) for (first, last, _), c in chunks]  # type: ignore[no-untyped-call]
        counts = isinstance(passing, FirstPass) and not passing.recomputing
        if counts and running_mean is not None and running_var is not None:
            mean, var = map(parts.cat, zip(*found, strict=True))
            passing.statistics.append(Statistics(running_mean, running_var, momentum, mean, var))
        return parts.cat(made)

    collect = staticmethod(collect_copies)


class Normalise(torch.autograd.Function):
    """Normalises ``k`` micro-batches of one size, below each other.

    The backward is that of torch, once for each: 2 to 5 % of a step of a ResNet. The forward of torch is slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, both: Tensor, eps: float, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the output for scale and shift, ``(k, 2, C)``, and append means and unbiased variances, ``(k, C)``."""
        values, (w, b) = _by_channel(x, both.shape[0]), both.unbind(1)
        count, dtype = values.shape[1] * values.shape[3], wide(values[:0]).dtype
        mean = values.sum((1, 3), dtype=dtype) / count
        centred = values - _along(mean)
        square = torch.linalg.vector_norm(centred, dim=3).square().sum(1)
        r = (square / count + eps).rsqrt()
        ctx.save_for_backward(centred, r, w)
        y = torch.addcmul(_along(b.to(dtype)), centred, _along(r * w))
        found.append((mean, square / (count - 1)))
        return no_view(y.to(x.dtype).reshape(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the input, and of scale and shift for each micro-batch."""
        centred, r, w = ctx.saved_tensors
        rows = zip(_by_channel(d, len(r)).to(centred.dtype), centred, w.to(r.dtype), r, strict=True)
        backward, zero = torch.ops.aten.native_batch_norm_backward, torch.zeros_like(r[0])  # the mean of ``centred``
        made = [backward(d_k, x_k, w_k, None, None, zero, r_k, True, 0.0, [True] * 3) for d_k, x_k, w_k, r_k in rows]
        dx, dw, db = map(torch.stack, zip(*made, strict=True))
        return dx.to(d.dtype).reshape(d.shape), torch.stack((dw, db), 1).to(w.dtype), None, None


def _by_channel(x: Tensor, k: int) -> Tensor:
    """Return ``(k m, C, ...)`` as ``(k, m, C, positions)``."""
    return x.reshape(k, x.shape[0] // k, x.shape[1], -1)


def _along(t: Tensor) -> Tensor:
    """Return ``(k, C)`` with the dimensions of what :func:`_by_channel` returns."""
    return t[:, None, :, None]


def update_running_statistics(model: nn.Module, passing: Interception) -> None:
    """Update running statistics as the serial loop does, which runs the whole model on one micro-batch after another.

    With momentum ``a`` and ``s_1 ... s_T`` in that order, ``r <- (1 - a)^T r + sum_t a (1 - a)^(T - t) s_t``. Without
    (``momentum=None``) it is the mean over all batches so far.

    Raises:
        CannotFactor: the buffers are not those of one of torch's modules, or of a module without a counter.
    """
    if not passing.statistics:
        return
    owners = {id(buffer): module for module in model.modules() for buffer in module._buffers.values()}
    calls: dict[int, list[Statistics]] = {}
    for call in passing.statistics:
        calls.setdefault(id(call.running_mean), []).append(call)
    known: dict[Any, tuple[Tensor, Tensor | float]] = {}  # the weights, which are the same for most modules
    with torch.no_grad():
        for key, found in calls.items():
            module = owners.get(key)
            counter = getattr(module, "num_batches_tracked", None)
            if module is None or (counter is not None and not isinstance(module, _BatchNorm)):
                raise CannotFactor("running statistics are kept by something else than a module of torch")
            if len({call.momentum for call in found}) > 1 and getattr(module, "momentum", 0) is not None:
                raise CannotFactor("running statistics are updated with several momenta")
            T = len(found) * found[0].mean.shape[0]
            if counter is not None:
                counter += T - len(found)  # its module has counted one batch a call
            for buffer, name in ((found[0].running_mean, "mean"), (found[0].running_var, "var")):
                each = [getattr(call, name) for call in found]
                sequence = each[0] if len(each) == 1 else torch.stack(each, 1).flatten(0, 1)  # micro-batches first
                own = counter is not None and module.momentum is None
                which = (id(module) if own else found[0].momentum, T, buffer.dtype, buffer.device)
                if which not in known:
                    known[which] = _weights(T, buffer, counter if own else None, found[0].momentum)
                weights, kept = known[which]
                buffer.mul_(kept).add_(weights @ sequence.to(buffer.dtype))


def _weights(T: int, like: Tensor, counter: Tensor | None, momentum: float) -> tuple[Tensor, Tensor | float]:
    """Return the weights of ``T`` statistics in the running ones, shape ``(T,)``, and that of the running ones."""
    if counter is not None:
        weights = like.new_ones(T) / counter
        return weights, 1 - weights.sum()
    return like.new_tensor([momentum * (1 - momentum) ** (T - 1 - t) for t in range(T)]), (1 - momentum) ** T
