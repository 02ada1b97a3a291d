"""Functions and modules that run as several: attention, bags of embeddings, recurrent networks, registered modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from steppe.engine.functional import functional
from steppe.factored.copies import AnyFunction
from steppe.factored.microbatches import MicroBatches
from steppe.factored.sites import ANY, CannotFactor, Interception, collect_copies


class Composite:
    """A function that is carried out by others, each of which is intercepted.

    Args:
        func: the torch function.
        steps: returns its value, from the arguments by name.
    """

    def __init__(self, func: Callable[..., Any], steps: Callable[[SimpleNamespace], Any]) -> None:
        self.signature, self.steps = inspect.signature(func), steps

    def run(self, passing: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the same value."""
        call = self.signature.bind(*args, **kwargs)
        call.apply_defaults()
        if passing.tracked.first_in(call.arguments.values()) is None:
            return NotImplemented
        with passing:
            return self.steps(SimpleNamespace(**call.arguments))


def multi_head_attention(a: SimpleNamespace) -> tuple[Tensor, Tensor | None]:
    """Return the output and weights of ``torch.nn.MultiheadAttention``, whose projections are calls of ``F.linear``.

    Examples come first, so that the rows of an example are neighbours.
    """
    odd = ("bias_k", "bias_v", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v")
    used = [name for name in odd if getattr(a, name) is not None] + ["add_zero_attn"] * a.add_zero_attn
    if used or a.query.dim() != 3:
        raise CannotFactor(f"multi-head attention with {', '.join(used) or 'unbatched input'} has no factored form")
    q, k, v = (t.reshape(*t.shape[:2], a.num_heads, -1).transpose(1, 2) for t in _projected(a))  # (n, heads, length, d)
    mask, dropout, weights = _mask(a, q), a.dropout_p if a.training else 0.0, None
    if a.need_weights:
        scores = q @ k.mT / q.shape[-1] ** 0.5
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = F.linear(out.transpose(1, 2).flatten(2), a.out_proj_weight, a.out_proj_bias)
    return out.transpose(0, 1), weights.mean(1) if weights is not None and a.average_attn_weights else weights


def _projected(a: SimpleNamespace) -> list[Tensor]:
    """Return query, key and value after ``in_proj``: ``(n, length, heads d)``."""
    inputs, W, b = [a.query, a.key, a.value], a.in_proj_weight, a.in_proj_bias
    if a.query is a.key and a.key is a.value:
        return list(F.linear(a.query.transpose(0, 1), W, b).chunk(3, -1))
    return [F.linear(t.transpose(0, 1), W, b).chunk(3, -1)[i] for i, t in enumerate(inputs)]


def _mask(a: SimpleNamespace, q: Tensor) -> Tensor | None:
    """Return the sum of both masks, to be added to the scores; ``None`` without one."""
    total = None
    for m in (a.attn_mask, None if a.key_padding_mask is None else a.key_padding_mask[:, None, None]):
        if m is not None:
            m = m.unflatten(0, q.shape[:2]) if m.dim() == 3 else m
            m = torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m
            total = m if total is None else total + m
    return total


def bag(a: SimpleNamespace) -> Any:
    """Return ``F.embedding_bag`` over rows of equal length, as a lookup and a sum or mean."""
    odd = a.max_norm is not None or a.scale_grad_by_freq or a.sparse
    if a.input.dim() != 2 or a.mode == "max" or odd:
        raise CannotFactor("an embedding bag with offsets, a maximum or other options has no factored form")
    rows = F.embedding(a.input, a.weight, a.padding_idx)
    if a.per_sample_weights is not None:
        return (rows * a.per_sample_weights[..., None]).sum(1)
    if a.padding_idx is None:
        return rows.sum(1) if a.mode == "sum" else rows.mean(1)
    counted = (a.input != a.padding_idx % len(a.weight))[..., None].to(rows.dtype)
    total = (rows * counted).sum(1)
    return total if a.mode == "sum" else total / counted.sum(1).clamp_min(1)


class Recurrent:
    """``torch.lstm``, ``gru`` and ``rnn_tanh``, which ``vmap`` cannot run, in a loop over micro-batches."""

    def run(
        self, passing: Interception, func: Any, input: Tensor, hidden: Any, weights: Any, *options: Any
    ) -> tuple[Tensor, ...] | Any:
        """Return the outputs, and the last states of all layers."""
        if passing.tracked.first_in((weights, *options)) is None:
            return NotImplemented
        if not isinstance(options[0], bool):
            raise CannotFactor("a recurrent network over packed sequences has no factored form")
        parts = passing.parts or MicroBatches(passing.tracked.n, 1)
        examples = 0 if options[-1] else 1  # the last option is batch_first
        if input.dim() != 3 or input.shape[examples] != parts.n:
            raise CannotFactor("a recurrent network whose examples are not along its batch dimension")
        index = [passing.tracked.index(p) for p in weights]
        own = [
            [p] * parts.k if i is None else passing.copies(self, [p], (i, None), parts.k, parts)[:, 0]
            for p, i in zip(weights, index, strict=True)
        ]
        several, made = isinstance(hidden, tuple | list), []
        for start, *mine in zip(parts.starts, *own, strict=True):
            size = min(parts.m, parts.n - start)
            given = [h.narrow(1, start, size).contiguous() for h in (hidden if several else [hidden])]
            x = input.narrow(examples, start, size)
            made.append(func(x, tuple(given) if several else given[0], mine, *options))
        outputs, *last = zip(*made, strict=True)
        return (torch.cat(outputs, examples), *(torch.cat(h, 1) for h in last))

    collect = staticmethod(collect_copies)


# ---- modules that are registered

_registered: set[type[nn.Module]] = set()


def register_factored(module_type: type[nn.Module]) -> type[nn.Module]:
    """Let micro-batches share passes through modules of this type, whatever they do with their parameters.

    Register a module whose parameters are used by operations that have no factored form. It must map one tensor to one
    tensor, both with the examples first, treat each example alone, and draw no random numbers. ``torch.func.vmap`` must
    be able to run it. Every micro-batch gets a copy of the module's parameters, so the module should be small.

    Args:
        module_type: the class of the module. The function may also decorate the class.

    Returns:
        The class.

    Raises:
        TypeError: ``module_type`` is not a subclass of ``torch.nn.Module``.

    Example:
        >>> register_factored(nn.PReLU)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}")
    _registered.add(module_type)
    return module_type


@contextmanager
def registered_modules(model: nn.Module, passing: Interception) -> Iterator[None]:
    """Let registered modules with perturbed parameters run as one function each."""
    modules = model.modules() if _registered else ()
    found = [m for m in modules if type(m) in _registered and "forward" not in vars(m)]
    found = [m for m in found if passing.tracked.first_in(m.parameters()) is not None]
    for module in found:
        module.forward = partial(_by_part, module, passing)
    try:
        yield
    finally:
        for module in found:
            del module.forward  # the class's own again


def _by_part(module: nn.Module, passing: Interception, x: Tensor) -> Any:
    """Run a module with a copy of its parameters for every micro-batch, and no interception inside."""
    if x.dim() == 0 or len(x) != passing.tracked.n:
        raise CannotFactor(f"{type(module).__name__} is registered but has no example dimension first")
    every = dict(module.named_parameters())
    own = {name: p for name, p in every.items() if passing.tracked.index(p) is not None}
    of_its_class = functional(module, lambda module, x: type(module).forward(module, x))
    layer: AnyFunction = passing.layers[ANY]
    with torch._C.DisableTorchFunction():
        return passing.at_work(layer.by_part, lambda p, x: of_its_class(every | p, x), (own, x), {})
