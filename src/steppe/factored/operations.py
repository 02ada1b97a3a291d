"""The operations that have a factored form, by torch function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.attention import Attention
from steppe.factored.conv import Conv
from steppe.factored.embedding import Embedding
from steppe.factored.linear import Linear
from steppe.factored.norm import GroupNorm, Norm
from steppe.factored.plain import Plain

_linear, _product, _plain, _in_place = Linear(), Linear(transposed=True), Plain(), Plain(in_place=True)

OPERATIONS: dict[Any, Any] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _product),
    torch.addmm: Linear(transposed=True, arguments=(1, 2, 0)),
    torch.conv1d: Conv(1),
    torch.conv2d: Conv(2),
    torch.conv3d: Conv(3),
    F.embedding: Embedding(),
    F.layer_norm: Norm((2, 3), ("weight", "bias"), channels_first=False),
    F.rms_norm: Norm((2, None), ("weight", "bias"), channels_first=False),
    F.group_norm: GroupNorm(),
    F.instance_norm: Norm((3, 4), ("weight", "bias"), channels_first=True),
    F.batch_norm: Norm((3, 4), ("weight", "bias"), channels_first=True),
    F.multi_head_attention_forward: Attention(),
    **dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div, torch.true_divide), _plain),
    **dict.fromkeys((Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.true_divide), _plain),
    **dict.fromkeys((Tensor.__add__, Tensor.__sub__, Tensor.__mul__, Tensor.__truediv__), _plain),
    **dict.fromkeys((Tensor.__radd__, Tensor.__rsub__, Tensor.__rmul__), _plain),
    **dict.fromkeys((Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.true_divide_), _in_place),
    Tensor.expand: _plain,
}
