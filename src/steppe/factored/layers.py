"""The layers with a weight matrix, and the table of all layers by torch function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.composites import Composite, Recurrent, bag, multi_head_attention
from steppe.factored.copies import AnyFunction, Elementwise
from steppe.factored.gradients import PerturbedMap
from steppe.factored.maps import Conv, Dense, Lookup, Map, Use
from steppe.factored.normalisation import BatchNorm, GroupNorm, NormLayer
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import ANY, CannotFactor, Matrices, Site, Small


@dataclass
class Call:
    """The arguments of one call of ``y = map(x, W) + b``; examples lie in the ``leading`` dimensions of ``x``.

    The indices of a lookup may belong to no example (``unbatched``): positions, or a table of their distances.
    """

    map: Map
    x: Tensor
    leading: torch.Size
    W: Tensor
    b: Tensor | None = None
    lookup: int = 0  # which lookup of the pass it is
    unbatched: bool = False

    def is_a_table(self) -> bool:
        """Return whether indices of several dimensions belong to no example: then ``W[x]`` is a function of ``W``."""
        return self.unbatched and self.x.dim() > 1 and self.x.shape[0] != 1

    def batched(self, n: int) -> Call:
        """Return the call with positions repeated for each example, along a first dimension."""
        if not self.unbatched:
            return self
        index = self.x if self.x.dim() > 1 else self.x[None]
        index = index.expand(n, *index.shape[1:])
        return replace(self, x=index, leading=index.shape)


DENSE, TURNED = Dense(), Dense(turned=True)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call | None:
    """Read the arguments of ``F.linear``."""
    return Call(DENSE, input, input.shape[:-1], weight, bias) if weight.dim() == 2 else None


def product(*args: Any, **kwargs: Any) -> Call | None:
    """Read the arguments of ``matmul`` or ``mm``."""
    x, W, *options = (*args, *kwargs.values())
    return Call(TURNED, x, x.shape[:-1], W) if W.dim() == 2 and not options else None


def addmm(*args: Any, **kwargs: Any) -> Call | None:
    """Read the arguments of ``addmm``."""
    b, x, W, *options = (*args, *kwargs.values())
    return Call(TURNED, x, x.shape[:-1], W, b) if not options else None


def conv(dims: int) -> Callable[..., Call | None]:
    """Return the reader of the arguments of a convolution in so many dimensions."""

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Call | None:
        if input.dim() != dims + 2:
            return None
        options = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)]
        return Call(conv_of(*options, groups, weight.shape), input, input.shape[:1], weight, bias)

    return read


@lru_cache
def conv_of(stride: Any, padding: Any, dilation: Any, groups: int, shape: torch.Size) -> Conv:
    """Return a convolution; one number stands for all dimensions."""
    dims = len(shape) - 2

    def each(v: Any) -> tuple[int, ...]:
        return (v,) * dims if isinstance(v, int) else v * (dims // len(v))

    if isinstance(padding, str):
        reach = [d * (size - 1) for d, size in zip(each(dilation), shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise CannotFactor("a convolution with padding='same' and an even kernel has no factored form")
        padding = tuple(r // 2 for r in reach) if padding == "same" else 0
    return Conv(each(stride), each(padding), each(dilation), groups, shape)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    """Read the arguments of ``F.embedding``; options that have no factored form are refused by its name."""
    supported = max_norm is None and not scale_grad_by_freq and not sparse
    padding = None if padding_idx is None else padding_idx % len(weight)
    return Call(Lookup(len(weight), padding), input, input.shape, weight) if supported else None


class MatrixLayer:
    """A layer ``y = map(x, W) + b``.

    Args:
        read: reads the arguments of the torch function; ``None`` where they have no factored form.
    """

    def __init__(self, read: Callable[..., Call | None]) -> None:
        self.read = read

    def run(self, passing: FirstPass | SecondPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer, with the weight and bias that the pass has."""
        call = self.read(*args, **kwargs)
        if call is None or passing.tracked.index(call.x) is not None:
            return NotImplemented
        weight, bias = passing.tracked.pair(call.W, call.b)
        if weight is None and bias is None:
            return NotImplemented
        if isinstance(call.map, Lookup):
            call.lookup, call.unbatched = passing.lookups, passing.lookups in passing.tracked.unbatched
            passing.lookups += 1
        if call.is_a_table():
            return passing.layers[ANY].derive(passing, func, args, kwargs)
        if isinstance(passing, SecondPass):
            return self.perturbed(passing, call.batched(passing.tracked.n), passing.next(self, weight, bias))
        given, call = call.x, call.batched(passing.tracked.n)
        x = call.x.flatten(0, -2) if isinstance(call.map, Dense) and call.x.dim() > 2 else call.x
        if x is not given:
            args = tuple([x if a is given else a for a in args])
            kwargs = {key: x if a is given else a for key, a in kwargs.items()}
        return self.recorded(passing, call, weight, bias, func(*args, **kwargs))

    def recorded(self, first: FirstPass, call: Call, weight: int | None, bias: int | None, y: Tensor) -> Tensor:
        """Keep the input of the layer, and watch its output."""
        shape = (*call.leading, *y.shape[1 if isinstance(call.map, Conv) else -1 :])
        kept = None if weight is None else call.x.detach()
        if kept is not None and kept.is_floating_point():
            kept = kept.to(y.dtype)
        y = first.watch(y, Site(self, weight, bias, kept, tuple(call.leading), call.map, lookup=call.lookup), shape)
        return y if y.shape == shape else y.reshape(shape)

    def perturbed(self, second: SecondPass, call: Call, site: Site) -> Any:
        """Return the output with the weight and bias of each micro-batch."""
        x = call.x.to(low(call.x)) if call.x.is_floating_point() else call.x
        if site.weight is not None:
            b_eps = second.small.get(site.bias)  # type: ignore[arg-type]  # none where it is kept with the weight's
            at = (site, call.map, *second.matrices[site.weight])
            return PerturbedMap.apply(x, call.W, call.b, b_eps, *at)  # type: ignore[no-untyped-call]
        y = call.map.apply(x.reshape(1, -1, *x.shape[len(call.leading) :]), call.W[None])
        y = y.reshape(*call.leading, *y.shape[2:])
        rows = second.rows_of(site, call.b, site.bias, call.leading)  # type: ignore[arg-type]
        return (y + rows.reshape(*rows.shape, *[1] * (y.dim() - rows.dim()))).to(x.dtype)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the use of the weight, and of the bias with it or by itself."""
        delta, with_weight = site.deltas[0], site.weight is not None and site.map is DENSE
        if site.weight is not None:
            x, bias = site.by_example(site.kept), site.bias if with_weight else None  # type: ignore[arg-type]
            matrices.setdefault(site.weight, []).append(Use(site.map, x, site.by_example(delta), bias))
        if site.bias is not None and not with_weight:
            channels = delta.flatten(2).sum(2) if isinstance(site.map, Conv) else delta
            small.setdefault(site.bias, []).append(site.sums(channels))


def low(t: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with ``t`` here: that of autocast where it is on."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


_product, _elementwise, _in_place = MatrixLayer(product), Elementwise(), Elementwise(in_place=True)

LAYERS: dict[Any, Any] = {
    F.linear: MatrixLayer(linear),
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _product),
    torch.addmm: MatrixLayer(addmm),
    torch.conv1d: MatrixLayer(conv(1)),
    torch.conv2d: MatrixLayer(conv(2)),
    torch.conv3d: MatrixLayer(conv(3)),
    F.embedding: MatrixLayer(embedding),
    F.embedding_bag: Composite(F.embedding_bag, bag),
    F.layer_norm: NormLayer((2, 3), channels_first=False),
    F.rms_norm: NormLayer((2, None), channels_first=False),
    F.group_norm: GroupNorm(),
    F.instance_norm: NormLayer((3, 4), channels_first=True),
    F.batch_norm: BatchNorm(),
    F.multi_head_attention_forward: Composite(F.multi_head_attention_forward, multi_head_attention),
    **dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div, torch.true_divide), _elementwise),
    **dict.fromkeys((Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.true_divide), _elementwise),
    **dict.fromkeys((Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__), _elementwise),
    **dict.fromkeys((Tensor.__radd__, Tensor.__rsub__, Tensor.__rmul__), _elementwise),
    **dict.fromkeys((Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.true_divide_), _in_place),
    Tensor.expand: _elementwise,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), Recurrent()),
    ANY: AnyFunction(),
}
