"""Torch functions without a factored form: every example or micro-batch runs them with its own copy of the parameters.

An elementwise function broadcasts a copy for every example. Another runs under ``vmap``, a copy for every micro-batch.
A function of parameters alone, such as ``weight.float()``, ``gamma.reshape(1, -1, 1, 1)``, ``exp(a)`` or a weight norm,
is noted and returned as it is. Where its result meets examples, each micro-batch ``k`` gets ``h(p_k)`` for its copy
``p_k`` of the parameters. The gradient of ``p_k`` is that of the micro-batch, and in the second pass ``p_k`` is
``p + eps_k``. Copies take the memory of ``n / m`` such parameters, as gradients that are held whole do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.func import vmap

from steppe.factored.microbatches import MicroBatches
from steppe.factored.sites import CannotFactor, Interception, Tracked, collect_copies, name_of

Values = dict[Any, Tensor]  # by index of a parameter: its value; by id of a result: the result for these values


@dataclass(frozen=True)
class Derived:
    """A function of parameters alone.

    Attributes:
        result: its value at ``w``.
        parameters: their indices.
        make: returns its value for other values of the parameters.
        transposed: whether it is the transpose of one matrix.
    """

    result: Tensor
    parameters: tuple[int, ...]
    make: Callable[[Values], Tensor]
    transposed: bool = False


NO_TENSOR = {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__format__"}
REPEATS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.tile, torch.broadcast_to, torch.tile}
TRANSPOSES = {Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__}  # type: ignore[attr-defined]
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class Elementwise:
    """An elementwise operation with a parameter, or an expansion of one: without ``vmap``, also in place.

    The parameter has no example dimension, or one of size 1. The other operand, or the expansion, has examples first.
    A small Llama, whose norms multiply by their scales, takes 9 to 11 % more of a step under ``vmap``.

    Args:
        in_place: whether the other operand is changed in place.
    """

    def __init__(self, in_place: bool = False) -> None:
        self.in_place = in_place

    def find(self, tracked: Tracked, args: tuple[Any, ...]) -> tuple[int, int] | None:
        """Return the position of the parameter and its index; ``None`` if it cannot be copied for every example."""
        if len(args) < 2:
            return None
        index = [tracked.index(a) for a in args[:2]]
        at = 0 if index[0] is not None else 1
        if index[at] is None or index[1 - at] is not None or (self.in_place and at == 0):
            return None
        p, other = args[at], args[1 - at]
        if not isinstance(other, Tensor):  # expand(n, ...): sizes
            sizes = other if isinstance(other, tuple | list | torch.Size) else args[1:]
            fits = at == 0 and p.dim() == len(sizes) and p.shape[0] == 1 and sizes[0] == tracked.n
        else:
            fits = other.dim() > 0 and other.shape[0] == tracked.n
            fits &= p.dim() < other.dim() or (p.dim() == other.dim() and p.shape[0] == 1)
        return (at, index[at]) if fits else None  # type: ignore[return-value]

    def run(self, passing: Interception, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """Apply the operation to a copy of the parameter for every example."""
        found = self.find(passing.tracked, args)
        if found is None:
            return NotImplemented
        at, index = found
        p, other = args[at], args[1 - at]
        dims = other.dim() if isinstance(other, Tensor) else p.dim()
        shape = p.shape[1:] if p.dim() == dims else (*[1] * (dims - 1 - p.dim()), *p.shape)
        copies = passing.copies(self, [p.reshape(shape)], (index, None), passing.tracked.n)
        return func(*args[:at], copies[:, 0], *args[at + 1 :], **kwargs)

    collect = staticmethod(collect_copies)


class AnyFunction:
    """Any torch function of perturbed parameters that no other layer has taken."""

    def run(self, passing: Interception, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Note a function of parameters alone, or run it for each micro-batch.

        Raises:
            CannotFactor: its arguments or results are not tensors of parameters, constants and examples.
        """
        index, name = passing.first_in((*args, *kwargs.values())), name_of(func)
        assert index is not None
        label = passing.tracked.names[index]
        if (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
            raise CannotFactor(f"{label} is used by {name}, which works in place")
        if name in NO_TENSOR:
            raise CannotFactor(f"{label} is used by {name}, not as a tensor")
        if name == "__setitem__":
            raise CannotFactor(f"{label} is written into another tensor")
        product = self.transposed_product(passing, func, args, kwargs)
        if product is not NotImplemented:
            return product
        tensors, n = list(_tensors((args, kwargs))), passing.tracked.n
        others = [t for t in tensors if passing.first_in([t]) is None]
        repeated = func in REPEATS and func(*args, **kwargs).shape[0] == n != tensors[0].shape[:1].numel()
        if any(_has_examples(t, n) for t in others) or repeated:
            return self.by_part(passing, func, args, kwargs)
        if any(t.requires_grad and not t.is_leaf for t in others):
            raise CannotFactor(f"{label} is used by {name} with activations whose examples do not come first")
        return self.derive(passing, func, args, kwargs)

    collect = staticmethod(collect_copies)

    def transposed_product(self, passing: Interception, func: Any, args: Any, kwargs: Any) -> Any:
        """Return ``x W^T`` or ``x (W^T)^T`` of a matrix that the other layers know."""
        derived = passing.derived.get(id(args[1])) if len(args) == 2 and not kwargs else None
        if derived is None or not derived.transposed or passing.first_in(args[:1]) is not None:
            return NotImplemented
        other = F.linear if func in PRODUCTS else torch.matmul if func is F.linear else None
        layer, W = passing.layers.get(other), passing.tracked.tensors[derived.parameters[0]]
        return NotImplemented if layer is None else layer.run(passing, other, args[0], W)

    def derive(self, passing: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the function's value, and note how to make it for other parameters."""
        result, tracked, known = func(*args, **kwargs), passing.tracked, dict(passing.derived)
        differentiable = torch.is_grad_enabled()
        found: list[int] = []  # the parameters
        for t in _tensors((args, kwargs)):
            index = tracked.index(t)
            found += [index] if index is not None else known[id(t)].parameters if id(t) in known else []

        def make(values: Values) -> Any:
            def value(t: Tensor) -> Tensor:
                index = tracked.index(t)
                if index is not None:
                    return values[index]
                if id(t) in known and id(t) not in values:
                    values[id(t)] = known[id(t)].make(values)
                return values.get(id(t), t)

            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                return func(*_mapped(value, args), **_mapped(value, kwargs))

        several = isinstance(result, tuple | list)
        for i, t in enumerate(result if several else [result]):
            if not isinstance(t, Tensor):
                raise CannotFactor(f"{tracked.names[found[0]]} is used by {name_of(func)}, not as a tensor")
            if tracked.index(t) is None:  # weight.float() may be the weight
                one = (lambda values, i=i: make(values)[i]) if several else make
                matrix = func in TRANSPOSES and tracked.index(args[0]) is not None and t.dim() == 2
                passing.derived[id(t)] = Derived(t, tuple(dict.fromkeys(found)), one, matrix)
        return result

    def by_part(self, passing: Interception, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the function's value with the parameters of each micro-batch."""
        parts = passing.parts or MicroBatches(passing.tracked.n, 1)
        values: dict[int, Tensor] = {}  # by index of a parameter: its copies
        own: dict[int, Tensor] = {}  # by id of an argument: its value for each micro-batch

        def copies(index: int) -> Tensor:
            if index not in values:
                p = passing.tracked.tensors[index]
                values[index] = passing.copies(self, [p], (index, None), parts.k, parts)[:, 0]
            return values[index]

        rows = (passing.call, *[_has_examples(t, parts.n) for t in _tensors((args, kwargs))])
        passing.calls |= {rows} - passing.proven  # a table may have as many rows as a later batch has examples
        for t in _tensors((args, kwargs)):
            index = passing.tracked.index(t)
            if index is not None:  # also where it has as many rows as there are examples
                own[id(t)] = copies(index)
            elif id(t) in passing.derived:
                derived = passing.derived[id(t)]
                own[id(t)] = _for_each(derived.make, {i: copies(i) for i in derived.parameters})
        func = scaled_dot_product_attention if func is F.scaled_dot_product_attention else func
        tensors = {id(t): t for t in _tensors((args, kwargs)) if id(t) not in own}
        examples = [t for t in tensors.values() if _has_examples(t, parts.n)]
        made = []
        for j, (start, stop, m) in enumerate(parts.spans):
            chunks = {id(t): _chunk(t, parts.n, slice(start, stop), m) for t in examples}
            chunks |= {key: parts.split(t)[j] for key, t in own.items()}

            def call(mine: Mapping[int, Tensor], m: int = m) -> Any:
                own_of = lambda x: mine.get(id(x), x)  # noqa: E731
                found = func(*_mapped(own_of, args), **_mapped(own_of, kwargs))
                return found if examples else found[:m]  # else it is repeated for n examples

            made.append(_for_each(call, chunks))
        if not all(isinstance(t, Tensor) and t.dim() > 1 for t in made):
            raise CannotFactor(f"what {name_of(func)} returns has no dimension of examples")
        return parts.cat([t.flatten(0, 1) for t in made])


def _for_each(call: Callable[[Any], Any], chunks: Mapping[int, Tensor]) -> Any:
    """Return the results for all micro-batches.

    Raises:
        CannotFactor: ``vmap`` cannot run the function.
    """
    warn: Any = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    warn(False)  # vmap runs some functions one by one, such as a weight norm
    try:
        return vmap(call, randomness="different")(chunks)
    except RuntimeError as error:
        if "vmap" not in str(error) and "atching rule" not in str(error):
            raise
        raise CannotFactor(f"a function of parameters and examples: {error}") from error
    finally:
        warn(True)


def _tensors(args: Any) -> Iterable[Tensor]:
    """Yield the tensors among arguments, also inside tuples, lists and dicts."""
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, tuple | list | dict):
        for a in args.values() if isinstance(args, dict) else args:
            yield from _tensors(a)


def _mapped(f: Callable[[Tensor], Tensor], args: Any) -> Any:
    if isinstance(args, Tensor):
        return f(args)
    if isinstance(args, dict):
        return {key: _mapped(f, a) for key, a in args.items()}
    return type(args)([_mapped(f, a) for a in args]) if type(args) in (tuple, list) else args


def _has_examples(t: Tensor, n: int) -> bool:
    """Return whether the first dimension of a tensor is that of the examples, or of examples with their rows."""
    if t.dim() == 0 or t.shape[0] % n:
        return False
    return t.shape[0] == n or (t.requires_grad and not t.is_leaf)


def _chunk(t: Tensor, n: int, examples: slice, m: int) -> Tensor:
    """Return some examples of ``(n q, ...)`` as ``(k, m q, ...)``."""
    q = len(t) // n
    rows = t[examples.start * q : examples.stop * q]
    return rows.reshape(-1, m * q, *t.shape[1:])


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``softmax(q k^T scale + mask) v``; under ``vmap`` torch's own has no gradient for a mask on a CPU."""
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        bias = attn_mask.dtype != torch.bool
        scores = scores + attn_mask if bias else scores.masked_fill(~attn_mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ v
