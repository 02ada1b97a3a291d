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
from steppe.factored.elementwise import NormLayer, collect_both, scale_and_shift
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
        parts = passing.parts
        if parts is None or x.shape[0] != parts.n:
            raise CannotFactor("the gradients of single examples are not defined: batch normalisation mixes examples")
        if min(m for *_, m in parts.spans) * x[0, 0].numel() == 1:
            raise Unsure("batch normalisation has one value per channel in a micro-batch")
        passing.mixes = True
        both = scale_and_shift(x, w, b)
        index = [passing.tracked.index(p) for p in both]
        if index == [None, None]:
            copies = torch.stack(both).expand(parts.k, -1, -1)
        else:
            copies = passing.scale_and_shift(self, both, index, parts.k, parts)
        found: list[tuple[Tensor, Tensor]] = []  # means and variances
        chunks = zip(parts.spans, parts.split(copies), strict=True)
        made = [Normalise.apply(x[first:last], c, eps, found) for (first, last, _), c in chunks]  # type: ignore[no-untyped-call]
        kept = running[0] is not None and running[1] is not None
        if kept and isinstance(passing, FirstPass) and not passing.recomputing:
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

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the gradients of the copies, which are those of the micro-batches."""
        collect_both(site, site.deltas[0], small)


class Normalise(torch.autograd.Function):
    """Normalises ``k`` micro-batches of one size, below each other."""

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
        zero = torch.zeros_like(r[0])  # the mean of what is centred
        made = [
            torch.ops.aten.native_batch_norm_backward(d_k, x_k, w_k, None, None, zero, r_k, True, 0.0, [True] * 3)
            for d_k, x_k, w_k, r_k in zip(_by_channel(d, len(r)).to(centred.dtype), centred, w.to(r.dtype), r, strict=True)
        ]
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
