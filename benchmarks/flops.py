"""Counted work: the floor that no implementation of the same products goes below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def conv_backward(grad: Any, x: Any, w: Any, *rest: Any, out_val: Any = None, **_: Any) -> int:
    """A convolution's gradients; torch 2.13's own count of the weight's is ``groups`` times too high."""
    transposed, groups, mask = rest[4], rest[6], rest[7]
    turned = lambda shape: [shape[1], shape[0], *shape[2:]]  # noqa: E731
    count = conv_flop_count(grad.shape, w.shape, out_val[0].shape, not transposed) if mask[0] else 0
    if mask[1]:
        a, b = (grad, x) if transposed else (x, grad)
        count += conv_flop_count(turned(a.shape), turned(b.shape), turned(out_val[1].shape), False) // groups
    return count


conv_backward._get_raw = True  # type: ignore[attr-defined]  # torch's counter: pass tensors, not shapes

FORMULAS = {  # what torch's counter miscounts, or does not know
    aten.convolution_backward: conv_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}
COUNTED = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry  # by operation, its formula


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of one step's matrix products, convolutions and attentions."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()
