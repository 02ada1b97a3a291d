"""Functions made of layers: attention and bags of embeddings are taken apart, recurrent networks run part by part."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from steppe.factored.microbatches import MicroBatches
from steppe.factored.sites import Interception, Matrices, Site, Small
from steppe.factored.tracked import CannotFactor

ATTENTION, BAG = inspect.signature(F.multi_head_attention_forward), inspect.signature(F.embedding_bag)


class Attention:
    """The function of ``torch.nn.MultiheadAttention``, with its projections as calls of ``F.linear``."""

    def run(self, passing: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the same attention; its linear layers are intercepted."""
        call = ATTENTION.bind(*args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        if passing.tracked.first_in(a.values()) is None:
            return NotImplemented
        odd = ("bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v")
        used = [name for name in odd if a[name] is not None] + ["add_zero_attn"] * a["add_zero_attn"]
        if used or a["query"].dim() != 3:
            raise CannotFactor(f"multi-head attention with {', '.join(used) or 'unbatched input'} has no factored form")
        with passing:
            return self.attend(a)

    record = evaluate = run

    def attend(self, a: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return output and weights; examples come first, so that the rows of an example are neighbours."""
        q, k, v = (self.heads(t, a["num_heads"]) for t in self.projected(a))  # (n, heads, length, d)
        mask, dropout = self.mask(a, q), a["dropout_p"] if a["training"] else 0.0
        weights = None
        if a["need_weights"]:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
        if weights is not None and a["average_attn_weights"]:
            weights = weights.mean(1)
        return out.transpose(0, 1), weights

    def projected(self, a: dict[str, Any]) -> list[Tensor]:
        """Return query, key and value after ``in_proj``: ``(n, length, heads d)``."""
        q, k, v, W, b = (a[name] for name in ("query", "key", "value", "in_proj_weight", "in_proj_bias"))
        if q is k and k is v:
            return list(F.linear(q.transpose(0, 1), W, b).chunk(3, -1))
        return [F.linear(t.transpose(0, 1), W, b).chunk(3, -1)[i] for i, t in enumerate((q, k, v))]

    @staticmethod
    def heads(t: Tensor, heads: int) -> Tensor:
        """Return ``(n, length, heads d)`` as ``(n, heads, length, d)``."""
        return t.reshape(*t.shape[:2], heads, -1).transpose(1, 2)

    @staticmethod
    def mask(a: dict[str, Any], q: Tensor) -> Tensor | None:
        """Return the sum of both masks, to be added to the scores; ``None`` without one."""
        n, heads = q.shape[:2]
        masks = []
        if a["attn_mask"] is not None:
            m = a["attn_mask"]
            masks.append(m.unflatten(0, (n, heads)) if m.dim() == 3 else m)
        if a["key_padding_mask"] is not None:
            masks.append(a["key_padding_mask"][:, None, None])
        added = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks
        ]
        total: Tensor | None = sum(added[1:], added[0]) if added else None
        return total


class Bag:
    """``F.embedding_bag`` over rows of equal length, as a lookup and a sum or mean."""

    def run(self, passing: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the sums; the lookup is intercepted."""
        call = BAG.bind(*args, **kwargs)
        call.apply_defaults()
        a = call.arguments
        index, padding, weights = a["input"], a["padding_idx"], a["per_sample_weights"]
        if passing.tracked.index(a["weight"]) is None:
            return NotImplemented
        odd = a["max_norm"] is not None or a["scale_grad_by_freq"] or a["sparse"]
        if index.dim() != 2 or a["mode"] == "max" or odd or passing.tracked.index(weights) is not None:
            raise CannotFactor("an embedding bag with offsets, a maximum or other options has no factored form")
        with passing:
            rows = F.embedding(index, a["weight"], padding)
        if weights is not None:
            return (rows * weights[..., None]).sum(1)
        if padding is None:
            return rows.sum(1) if a["mode"] == "sum" else rows.mean(1)
        counted = (index != padding % len(a["weight"]))[..., None].to(rows.dtype)
        total = (rows * counted).sum(1)
        return total if a["mode"] == "sum" else total / counted.sum(1).clamp_min(1)

    record = evaluate = run


class Recurrent:
    """``torch.lstm``, ``gru`` and ``rnn_tanh``, which ``vmap`` cannot run, in a loop over micro-batches."""

    def run(
        self, passing: Interception, func: Any, input: Tensor, hidden: Any, weights: Any, *options: Any
    ) -> tuple[Tensor, ...] | Any:
        """Return the outputs, and the last states of all layers."""
        if passing.tracked.first_in((weights, *options)) is None:
            return NotImplemented
        index = [passing.tracked.index(p) for p in weights]
        if not isinstance(options[0], bool):
            raise CannotFactor("a recurrent network over packed sequences has no factored form")
        parts = passing.parts or MicroBatches(passing.tracked.n, 1)
        examples = 0 if options[-1] else 1  # the last option is batch_first
        if input.dim() != 3 or input.shape[examples] != parts.n:
            raise CannotFactor("a recurrent network whose examples are not along its batch dimension")
        own = [
            None if i is None else passing.copies_by_part(self, p, i, parts)
            for p, i in zip(weights, index, strict=True)
        ]
        made = []
        states = hidden if isinstance(hidden, tuple | list) else (hidden,)
        for k, start in enumerate(parts.starts):
            size = min(parts.m, parts.n - start)
            given = [h.narrow(1, start, size).contiguous() for h in states]
            mine = [p if copy is None else copy[k] for p, copy in zip(weights, own, strict=True)]
            x = input.narrow(examples, start, size)
            made.append(func(x, tuple(given) if isinstance(hidden, tuple | list) else given[0], mine, *options))
        outputs, *last = zip(*made, strict=True)
        return (torch.cat(outputs, examples), *(torch.cat(h, 1) for h in last))

    record = evaluate = run

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the gradients of the copies, which are those of the micro-batches."""
        small.setdefault(site.weight, []).append(site.deltas[0])  # type: ignore[arg-type]
