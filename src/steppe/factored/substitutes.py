"""Torch functions that ``vmap`` cannot run at once, written with those that it can."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``g v / norm(v)``, with a norm for each index of a dimension, in functions that ``vmap`` runs at once."""
    return v * (g / v.square().sum([d for d in range(v.dim()) if d != dim % v.dim()], keepdim=True).sqrt())


def bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x_i W_oij y_j + b_o``, in functions that ``vmap`` runs at once."""
    out = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return out if bias is None else out + bias


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``softmax(q k^T scale + mask) v``, whose mask may have a gradient."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        bias = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if bias else scores.masked_fill(~attn_mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v


SAME: dict[Any, Any] = {
    torch._weight_norm: weight_norm,
    F.bilinear: bilinear,
    F.scaled_dot_product_attention: attention,
}
