"""The layers with a weight matrix: what each records in the first pass, and how it is perturbed in the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.attention import Attention
from steppe.factored.elementwise import Elementwise, GroupNormLayer, NormLayer
from steppe.factored.gradients import Gradient, Product, Whole
from steppe.factored.maps import Convolved, Dense, Lookup
from steppe.factored.passes import CannotFactor, FirstPass, Matrices, SecondPass, Site, Small
from steppe.factored.patches import ConvSpec
from steppe.factored.perturbed import Blocks, FactoredConv, FactoredLinear, HeldConv, HeldLinear, PartwiseEmbedding


def low(t: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with ``t`` here: that of autocast where it is on."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


class LinearLayer:
    """``y = x W^T + b``; with ``transposed``, ``y = x W + b``."""

    def __init__(self, transposed: bool = False, arguments: tuple[int, int, int] = (0, 1, 2)) -> None:
        self.transposed, self.arguments = transposed, arguments

    def read(self, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias."""
        x, W, b = (args[i] if i < len(args) else None for i in self.arguments)
        return x, W, b  # type: ignore[return-value]

    def record(self, first: FirstPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer, and keep its input."""
        args = (*args, *kwargs.values())
        x, W, b = self.read(args)
        weight, bias = first.tracked.index(W), first.tracked.index(b)
        if (weight is None and bias is None) or first.tracked.index(x) is not None or W.dim() != 2:
            return NotImplemented
        rows = x.flatten(0, -2) if x.dim() > 2 else x
        y = func(*(rows if a is x else a for a in args))
        shape = torch.Size((*x.shape[:-1], y.shape[-1]))
        kept = None if weight is None else x.detach().to(y.dtype)
        return first.watch(y, Site(self, weight, bias, kept, tuple(shape[:-1])), shape).reshape(shape)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the term of the weight, which may include the bias, and the gradients of the bias."""
        delta = site.delta
        if site.weight is not None:
            a = site.by_example(site.kept)  # type: ignore[arg-type]
            term = Dense(a, delta) if self.transposed else Dense(delta, a, site.bias)
            matrices.setdefault(site.weight, []).append(term)
        if site.bias is not None and (site.weight is None or self.transposed):
            small.setdefault(site.bias, []).append(delta.sum(1))

    def evaluate(self, second: SecondPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer with the weights of each micro-batch."""
        args = (*args, *kwargs.values())
        x, W, b = self.read(args)
        weight, bias = second.tracked.index(W), second.tracked.index(b)
        if (weight is None and bias is None) or second.tracked.index(x) is not None or W.dim() != 2:
            return NotImplemented
        site = second.next(self, weight, bias)
        W = W.mT if self.transposed else W
        x = x.to(low(x))
        if weight is None:
            return (F.linear(x, W) + second.rows_of(site, b, bias, x.shape[:-1])).to(x.dtype)  # type: ignore[arg-type]
        x_e = site.by_example(x)
        see_with = self.with_held if isinstance(second.matrices[weight][0], Whole) else self.with_factors
        return site.by_row(see_with(second, site, x_e, W, b), x.shape[:-1])

    def with_held(self, second: SecondPass, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return ``x (W + eps_k)^T + b_k`` with ``W + eps_k`` in memory."""
        weights = Blocks(*second.matrices[site.weight], W, x.dtype, self.transposed)  # type: ignore[arg-type, index]
        b_k: Sequence[Any] = [None] * len(second.parts.spans)
        if b is not None:
            b_k = second.parts.split(second.of_parts(b, site.bias)[:, None].to(x.dtype))
        return HeldLinear.apply(x, W, b, weights, b_k)  # type: ignore[no-any-return, no-untyped-call]

    def with_factors(self, second: SecondPass, site: Site, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return ``x (W + eps_k)^T + b_k`` with ``eps_k`` as factors."""
        rides = site.bias not in second.small
        b_eps = None if rides else second.parts.spread(second.small[site.bias])[:, None].to(x.dtype)  # type: ignore[index]
        product = Product(*second.matrices[site.weight], self.transposed)  # type: ignore[arg-type, index]
        return FactoredLinear.apply(x, W, b, product, b_eps)  # type: ignore[no-any-return, no-untyped-call]


class ConvLayer:
    """``y = conv(x, W) + b`` in one, two or three dimensions."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def read(
        self,
        x: Tensor,
        W: Tensor,
        b: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor | None, ConvSpec]:
        """Return the arguments, with one number a dimension."""

        def each(v: Any) -> tuple[int, ...]:
            return (v,) * self.dims if isinstance(v, int) else tuple(v) * (self.dims // len(v))

        if isinstance(padding, str):
            reach = [d * (size - 1) for d, size in zip(each(dilation), W.shape[2:], strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                raise CannotFactor("a convolution with padding='same' and an even kernel has no factored form")
            padding = tuple(r // 2 for r in reach) if padding == "same" else 0
        return x, W, b, ConvSpec(each(stride), each(padding), each(dilation), groups, W.shape)

    def record(self, first: FirstPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer, and keep its input."""
        x, W, b, spec = self.read(*args, **kwargs)
        weight, bias = first.tracked.index(W), first.tracked.index(b)
        if (weight is None and bias is None) or x.dim() != self.dims + 2:
            return NotImplemented
        y = func(*args, **kwargs)
        kept = None if weight is None else x.detach().to(y.dtype)
        return first.watch(y, Site(self, weight, bias, kept, (len(x),), (spec,)))

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the term of the weight and the gradients of the bias."""
        delta = site.delta
        if site.weight is not None:
            term = Convolved(site.by_example(site.kept), delta, site.static[0])  # type: ignore[arg-type]
            matrices.setdefault(site.weight, []).append(term)
        if site.bias is not None:
            small.setdefault(site.bias, []).append(delta.flatten(3).sum((1, 3)))

    def evaluate(self, second: SecondPass, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Apply the layer with the weights of each micro-batch."""
        x, W, b, spec = self.read(*args, **kwargs)
        weight, bias = second.tracked.index(W), second.tracked.index(b)
        if (weight is None and bias is None) or x.dim() != self.dims + 2:
            return NotImplemented
        site = second.next(self, weight, bias)
        x = x.to(low(x))
        if weight is None:
            return self.plus(second, site, func(x, W, None, spec.stride, spec.padding, spec.dilation, spec.groups), b)
        see_with = self.with_held if isinstance(second.matrices[weight][0], Whole) else self.with_patches
        return see_with(second, site, x, W, b, spec)

    def with_held(
        self, second: SecondPass, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: ConvSpec
    ) -> Tensor:
        """Return ``conv(x, W + eps_k) + b_k`` with ``W + eps_k`` in memory."""
        weights = Blocks(*second.matrices[site.weight], W, x.dtype)  # type: ignore[arg-type, index]
        b_k: Sequence[Any] = [None] * len(second.parts.spans)
        if b is not None:
            b_k = second.parts.split(second.of_parts(b, site.bias).to(x.dtype))
        y: Tensor = HeldConv.apply(site.by_example(x), W, b, weights, b_k, spec)  # type: ignore[no-untyped-call]
        return site.by_row(y, (len(x),))

    def with_patches(
        self, second: SecondPass, site: Site, x: Tensor, W: Tensor, b: Tensor | None, spec: ConvSpec
    ) -> Tensor:
        """Return ``conv(x, W + eps_k) + b_k`` with ``eps_k`` as factors."""
        product = Product(*second.matrices[site.weight])  # type: ignore[arg-type, index]
        y: Tensor = FactoredConv.apply(site.by_example(x), W, product, spec)  # type: ignore[no-untyped-call]
        return self.plus(second, site, site.by_row(y, (len(x),)), b)

    def plus(self, second: SecondPass, site: Site, y: Tensor, b: Tensor | None) -> Tensor:
        """Return ``y + b``, with the ``b`` of each micro-batch."""
        if b is None:
            return y
        rows = b if site.bias is None else second.rows_of(site, b, site.bias, y.shape[:1])
        return (y + rows.reshape(*rows.shape, *[1] * self.dims)).to(y.dtype)


class EmbeddingLayer:
    """``y = W[index]``."""

    def record(
        self,
        first: FirstPass,
        func: Any,
        index: Tensor,
        W: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Any:
        """Look up, and keep the index; rows that belong to no example are repeated for each of them."""
        weight = first.tracked.index(W)
        if weight is None:
            return NotImplemented
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise CannotFactor(f"{first.tracked.names[weight]} uses an option of embedding that has no factored form")
        free = first.next_is_unbatched()
        index = self.repeated(index, first.tracked.n) if free else index
        y = F.embedding(index, W, padding_idx)
        return first.watch(y, Site(self, weight, None, index, tuple(index.shape), (padding_idx, free, len(W))))

    @staticmethod
    def repeated(index: Tensor, n: int) -> Tensor:
        """Return the index repeated for every example along the first dimension."""
        return (index if index.dim() > 1 and index.shape[0] == 1 else index[None]).expand(n, *index.shape[-1:])

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add a lookup term; padding has no gradient."""
        index, delta = site.by_example(site.kept), site.delta  # type: ignore[arg-type]
        padding, _, height = site.static
        if padding is not None:
            delta = delta * (index != padding)[..., None]
        matrices.setdefault(site.weight, []).append(Lookup(index, delta, height))  # type: ignore[arg-type]

    def evaluate(self, second: SecondPass, func: Any, index: Tensor, W: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return ``W[index] + eps_k[index]``."""
        weight = second.tracked.index(W)
        if weight is None:
            return NotImplemented
        site = second.next(self, weight, None)
        padding, free, _ = site.static
        index = self.repeated(index, second.tracked.n) if free else index
        rows = site.by_row(self.rows(second, site.by_example(index), W.detach(), *second.matrices[weight]), index.shape)
        return PartwiseEmbedding.apply(W, rows, index, padding)  # type: ignore[no-untyped-call]

    @staticmethod
    def rows(second: SecondPass, index: Tensor, W: Tensor, gradient: Gradient, scale: Tensor) -> Tensor:
        """Return ``W[index] + eps_k[index]`` for indices of ``(n, q)``."""
        if isinstance(gradient, Whole):
            chunks, width = second.parts.chunks(index), W.shape[1]
            blocks = gradient.perturbed(W, scale, W.dtype)
            looked = [P.gather(1, chunks[c][at][..., None].expand(-1, -1, width)) for c, at, P in blocks]
            return second.parts.join(looked, index.shape[1])
        eps = second.parts.spread(scale)[:, None, None].to(W.dtype) * gradient.rows(index)
        return W[index] + eps


_linear, _product, _elementwise, _in_place = (
    LinearLayer(),
    LinearLayer(transposed=True),
    Elementwise(),
    Elementwise(in_place=True),
)

LAYERS: dict[Any, Any] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _product),
    torch.addmm: LinearLayer(transposed=True, arguments=(1, 2, 0)),
    torch.conv1d: ConvLayer(1),
    torch.conv2d: ConvLayer(2),
    torch.conv3d: ConvLayer(3),
    F.embedding: EmbeddingLayer(),
    F.layer_norm: NormLayer((2, 3), channels_first=False),
    F.rms_norm: NormLayer((2, None), channels_first=False),
    F.group_norm: GroupNormLayer(),
    F.instance_norm: NormLayer((3, 4), channels_first=True),
    F.batch_norm: NormLayer((3, 4), channels_first=True),
    F.multi_head_attention_forward: Attention(),
    **dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div, torch.true_divide), _elementwise),
    **dict.fromkeys((Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.true_divide), _elementwise),
    **dict.fromkeys((Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__), _elementwise),
    **dict.fromkeys((Tensor.__radd__, Tensor.__rsub__, Tensor.__rmul__), _elementwise),
    **dict.fromkeys((Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.true_divide_), _in_place),
    Tensor.expand: _elementwise,
}
