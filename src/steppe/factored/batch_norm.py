"""Batch normalisation in one pass over the whole batch, each micro-batch by its own statistics.

For the values ``x`` of a channel in micro-batch ``k``, ``y = (x - mean_k) r_k w + b`` with
``r_k = 1 / sqrt(var_k + eps)`` (Ioffe and Szegedy 2015, arXiv 1502.03167). The gradients are those of the paper,
for each micro-batch: with ``c = x - mean_k`` and ``N`` values, ``db_k = sum d``, ``dw_k = r_k sum(d c)`` and
``dx = r_k w (d - db_k / N - c r_k dw_k / N)``. So both passes of m-SAM are those of the serial loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from steppe.engine.vector import wide
from steppe.factored.elementwise import NormLayer
from steppe.factored.gradients import no_view
from steppe.factored.passes import FirstPass
from steppe.factored.sites import CannotFactor, Interception, Matrices, Site, Small, Unsure


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

    affine = NormLayer((3, 4), channels_first=True)

    def run(self, passing: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalise, with a copy of scale and shift for every micro-batch."""
        x, running, w, b, training, momentum, eps = self.read(*args, **kwargs)
        if not training:
            return getattr(self.affine, passing.method)(passing, func, *args, **kwargs)
        parts, channels = passing.parts, x.shape[1]
        if parts is None or len(x) != parts.n:
            raise CannotFactor("the gradients of single examples are not defined: batch normalisation mixes examples")
        if min(m for *_, m in parts.spans) * x[0, 0].numel() == 1:
            raise Unsure("batch normalisation has one value per channel in a micro-batch")
        passing.mixes = True
        scale, shift = (self.copies(passing, p, x.new_full((channels,), start)) for p, start in ((w, 1.0), (b, 0.0)))
        found: list[tuple[Tensor, Tensor]] = []  # means and variances
        chunks = zip(parts.spans, parts.split(scale), parts.split(shift), strict=True)
        made = [Normalise.apply(x[first:last], w_k, b_k, eps, found) for (first, last, _), w_k, b_k in chunks]  # type: ignore[no-untyped-call]
        if None not in running and isinstance(passing, FirstPass) and not passing.recomputing:
            mean, var = map(parts.cat, zip(*found, strict=True))
            passing.statistics.append(Statistics(*running, momentum, mean, var))
        return parts.cat(made)

    record = evaluate = run

    @staticmethod
    def read(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Tensor, tuple[Any, Any], Tensor | None, Tensor | None, bool, float, float]:
        """Return the arguments of ``torch.nn.functional.batch_norm``."""
        return input, (running_mean, running_var), weight, bias, training, momentum, eps

    def copies(self, passing: Interception, p: Tensor | None, without: Tensor) -> Tensor:
        """Return scale or shift for every micro-batch, ``(k, C)``."""
        assert passing.parts is not None
        index = passing.tracked.index(p)
        if p is None or index is None:
            return (without if p is None else p).expand(passing.parts.k, -1)
        return passing.copies_by_part(self, p, index, passing.parts)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add nothing: the gradients of the copies are those of the micro-batches."""


class Normalise(torch.autograd.Function):
    """Normalises ``k`` micro-batches of one size, below each other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, eps: float, found: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the output, and append means and unbiased variances to ``found``; all of them are ``(k, C)``."""
        values = _by_channel(x, len(w))
        count, dtype = values.shape[1] * values.shape[3], wide(values[:0]).dtype
        mean = values.sum(3, dtype=dtype).sum(1) / count
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
        """Return the gradients of the input, and of ``w`` and ``b`` for each micro-batch."""
        centred, r, w = ctx.saved_tensors
        shape, dtype, d = d.shape, d.dtype, _by_channel(d, len(w)).to(centred.dtype)
        count = centred.shape[1] * centred.shape[3]
        db, dw = d.sum(3).sum(1), (d * centred).sum(3).sum(1) * r
        dx = torch.addcmul(_along(-r * w * db / count), centred, _along(-r * r * w * dw / count))
        dx.addcmul_(d, _along(r * w))
        return dx.to(dtype).reshape(shape), dw.to(w.dtype), db.to(w.dtype), None, None


def _by_channel(x: Tensor, k: int) -> Tensor:
    """Return ``(k m, C, ...)`` as ``(k, m, C, positions)``."""
    return x.reshape(k, len(x) // k, x.shape[1], -1)


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
    with torch.no_grad():
        for key, found in calls.items():
            module = owners.get(key)
            counter = getattr(module, "num_batches_tracked", None)
            if module is None or (counter is not None and not isinstance(module, _BatchNorm)):
                raise CannotFactor("running statistics are kept by something else than a module of torch")
            if len({call.momentum for call in found}) > 1 and getattr(module, "momentum", 0) is not None:
                raise CannotFactor("running statistics are updated with several momenta")
            if counter is not None:
                counter += len(found) * (len(found[0].mean) - 1)  # its module has counted one batch a call
            for buffer, name in ((found[0].running_mean, "mean"), (found[0].running_var, "var")):
                sequence = torch.stack([getattr(call, name) for call in found], 1).flatten(0, 1)  # micro-batches first
                weights = _weights(found[0].momentum, sequence[:, 0], module, counter).to(buffer.dtype)
                buffer.mul_(1 - weights.sum()).add_(weights @ sequence.to(buffer.dtype))


def _weights(momentum: float, like: Tensor, module: nn.Module, counter: Tensor | None) -> Tensor:
    """Return the weights of a sequence of statistics in the running ones, shape ``(T,)``."""
    if counter is not None and module.momentum is None:
        return torch.ones_like(like) / counter
    later = torch.arange(len(like) - 1, -1, -1, device=like.device)
    return momentum * (1 - momentum) ** later.to(like)
