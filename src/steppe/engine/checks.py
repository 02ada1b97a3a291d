"""Arguments are checked before anything is changed; every error names the argument and what was expected."""

import inspect
import math
import operator
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from steppe.pieces.protocol import declared

FSDP1 = (
    "params must not be flattened by FullyShardedDataParallel, whose ranks see neither the whole norm nor single "
    "parameters: shard with torch.distributed.fsdp.fully_shard"
)
TENSOR_PARALLEL = (
    "params must not be the tensor-parallel shards that DistributedDataParallel(device_mesh=) keeps as plain tensors, "
    "of which no rank sees the whole norm: shard the data-parallel mesh with torch.distributed.fsdp.fully_shard"
)
STEP = "sharpness_step"  # in every group: steps so far


def number(name: str, value: float, expected: str, *, low: float = 0.0, below: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``low <= value < below``; ``TypeError`` if ``value`` is no real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    if not low <= value < below:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 <= value <= 1``."""
    number(name, value, "a number in [0, 1]", below=math.nextafter(1.0, 2.0))


def positive_share(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 < value <= 1``."""
    number(name, value, "a number in (0, 1]", low=math.ulp(0.0), below=math.nextafter(1.0, 2.0))


def positive(name: str, value: float, expected: str = "a number > 0") -> None:
    """Raise ``ValueError`` unless ``0 < value < inf``."""
    number(name, value, expected, low=math.ulp(0.0))


def non_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``0 <= value < inf``."""
    number(name, value, "a finite number >= 0")


def positive_integer(name: str, value: Any, expected: str = "a positive integer") -> None:
    """Raise ``ValueError`` unless ``value`` is an integer above 0."""
    try:
        integer = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = 0
    if integer < 1:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def kind(value: object) -> str:
    """Return what a value is, for a message: a tensor's shape, else its type."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def grad_scaler(scaler: object) -> None:
    """Raise ``TypeError`` unless ``scaler`` is ``None`` or a ``torch.amp.GradScaler``."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")


def criterion_beside(model: object, criterion: Any) -> Any:
    """Return a criterion; refuse one in the place of the model, and one that returns no loss per example."""
    if hasattr(model, "reduction") and isinstance(criterion, torch.nn.Module) and not hasattr(criterion, "reduction"):
        raise TypeError(
            "model and criterion are swapped: write Batch.supervised(model, criterion, inputs, targets), got "
            f"model={type(model).__name__}, criterion={type(criterion).__name__}"
        )
    reduction = getattr(criterion, "reduction", "none")
    if reduction != "none":
        raise ValueError(f'criterion must have reduction="none", got {reduction!r}')
    return criterion


def loss_among(returned: Any) -> Any:
    """Return the loss among what a closure returned: itself, its ``loss``, or the first entry of a tuple or list.

    Raises:
        TypeError: there is none of one number.
    """
    loss = returned
    if isinstance(returned, Mapping):  # also the outputs of Hugging Face's models
        loss = returned.get("loss")
    elif isinstance(returned, tuple | list) and not hasattr(returned, "loss"):
        loss = returned[0] if returned else None
    elif not isinstance(returned, Tensor):
        loss = getattr(returned, "loss", returned)
    if (isinstance(loss, Tensor) and loss.numel() == 1) or isinstance(loss, Real):
        return loss
    raise TypeError(
        f"closure must return the loss, one number, or it as .loss or as the first of several, got {kind(loss)}"
    )


def warn(message: str) -> None:
    """Warn at the user's line: the first one outside torch and steppe, where Python can tell it (3.12)."""
    if sys.version_info >= (3, 12):
        ours = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
        warnings.warn(message, UserWarning, skip_file_prefixes=ours)
    else:
        warnings.warn(message, UserWarning, stacklevel=9)  # past torch's wrappers of step


def check_call(name: str, args: Sequence[Any], options: dict[str, Any]) -> None:
    """Say how to write what ``sam.py`` and its copies write as ``SAM(params, SGD, lr=0.1, adaptive=True)``.

    Raises:
        TypeError: the call is of that kind.
    """
    if "base_optimizer" in options or any(isinstance(value, type) for value in args[1:2]):
        raise TypeError(
            f"{name} takes an optimizer, not parameters and a class: write "
            f"{name}(torch.optim.SGD(params, lr=0.1, momentum=0.9), rho=0.05)"
        )
    if "adaptive" in options:
        raise TypeError(
            "adaptive=True is a method of its own: write ASAM(base, rho), whose radius is about ten times as large"
        )
    if isinstance(options.get("rho"), list | tuple):
        raise TypeError(
            "rho is one number or a schedule; the radius of a group stands in the group: {'params': ..., 'rho': 0.1}"
        )
    if "lr" in options:
        raise TypeError(f"lr is the base optimizer's: write {name}(torch.optim.SGD(params, lr={options['lr']!r}))")


def check_base(base: object) -> torch.optim.Optimizer:
    """Return a base; refuse what cannot be one: no instance, no dense first-order method, wrapped already."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"base must be an optimizer instance, e.g. torch.optim.SGD(model.parameters(), lr=0.1), got {base!r}"
        )
    if type(base).__name__ == "PostLocalSGDOptimizer":
        raise TypeError(
            "base must not be a PostLocalSGDOptimizer, whose replicas differ between averages: a step averages over "
            "all ranks, and sync='local' perturbs every rank by itself"
        )
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError("base must be an optimizer of dense gradients, got SparseAdam")
    if isinstance(base, torch.optim.LBFGS) or _needs_closure(base):
        raise TypeError(
            f"base must step on the gradients in p.grad, got {type(base).__name__}, which calls a closure by itself"
        )
    if any(STEP in group for group in base.param_groups):
        raise ValueError(
            "base must be an optimizer that is not wrapped: make a new one, and load checkpoints into the wrapper"
        )
    return base


def bases_of(base: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """Return the optimizers of a :class:`~steppe.Joint`; any other is itself."""
    return getattr(base, "bases", (base,))


def _needs_closure(base: torch.optim.Optimizer) -> bool:
    """Tell whether ``step`` cannot be called without a closure."""
    _, *rest = inspect.signature(type(base).step).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(one.default is inspect.Parameter.empty and one.kind not in kinds for one in rest)


# What torch's own optimizers keep, of those that keep only some of what a rule may read; by name, as old releases of
# torch lack some.
KEPT = {
    "SGD": frozenset({"momentum_buffer"}),
    "Muon": frozenset({"momentum_buffer"}),
    "Adamax": frozenset({"exp_avg"}),
    "Adadelta": frozenset({"square_avg"}),
    "ASGD": frozenset[str](),
    "Adagrad": frozenset[str](),
    "Rprop": frozenset[str](),
}


def check_state(base: torch.optim.Optimizer, reads: frozenset[str], begun: bool = False) -> None:
    """Refuse a base that keeps nothing of what the rule reads.

    Of torch's own it is known before the first step, of others (``begun``) after it.

    Raises:
        TypeError: it keeps nothing of that; SGD without momentum is one.
    """
    if reads and not any(_may_keep(part, reads, begun) for part in bases_of(base)):
        kinds = " and ".join(sorted({type(part).__name__ for part in bases_of(base)}))
        raise TypeError(
            f"this method needs a base optimizer that keeps {' or '.join(sorted(reads))}, got {kinds} that does not"
        )


def _may_keep(base: torch.optim.Optimizer, reads: frozenset[str], begun: bool) -> bool:
    if any(reads & state.keys() for state in base.state.values()):
        return True
    name = type(base).__name__
    kept = KEPT.get(name) if f"{type(base).__module__}.".startswith("torch.optim.") else None
    if begun or kept is None:
        return not begun
    if name == "SGD" and not any(group["momentum"] for group in base.param_groups):
        return False
    return bool(reads & kept)


def check_rule(rule: object, base: torch.optim.Optimizer) -> None:
    """Refuse what is no rule, and a rule that reads what the base does not keep."""
    if not callable(rule):
        raise TypeError(f"rule must be a function from Oracle to Update, got {rule!r}")
    check_state(base, declared(rule).base_state)


def check_options(full: object, parallel: object, max_norm: float | None, model: object) -> None:
    """Refuse options of the optimizer that are none of the documented ones."""
    if full is not None and not callable(full):
        raise TypeError(f"full must be a closure over the larger batch, got {full!r}")
    if parallel not in ("auto", True, False):
        raise ValueError(f"parallel must be 'auto', True or False, got {parallel!r}")
    if max_norm is not None:
        positive("max_norm", max_norm, "a number > 0 or None")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")


def check_groups(groups: Sequence[dict[str, Any]], radius: str) -> None:
    """Refuse groups whose radius, parameters or options no step could use.

    Args:
        groups: parameter groups of one optimizer.
        radius: the key of the radius in them.
    """
    tensors = [_check_group(group, radius) for group in groups]
    check_apart([t for group in tensors for t in group])


def _check_group(group: dict[str, Any], radius: str) -> list[Tensor]:
    if radius in group:
        non_negative(radius, group[radius])
    if group.get("differentiable"):
        raise ValueError("differentiable must be False: the step is not differentiated through")
    if group.get("maximize"):
        raise ValueError("maximize must be False: the perturbation ascends the loss; minimise the negative instead")
    params = group["params"]
    listed = [params] if isinstance(params, Tensor) else params
    named = [p[1] if isinstance(p, tuple) else p for p in listed]
    tensors = [t for t in named if isinstance(t, Tensor)]  # the base refuses the others
    for t in tensors:
        if t.is_complex():
            raise TypeError("params must be real: a sharpness-aware step of complex parameters is not defined here")
        if t.is_meta:
            raise TypeError("params must hold numbers: these are on the meta device; materialise the model first")
        if getattr(t, "_is_flat_param", False):
            raise TypeError(FSDP1)
        if hasattr(t, "_st_info"):
            raise TypeError(TENSOR_PARALLEL)
    return tensors


def check_apart(tensors: Sequence[Tensor]) -> None:
    """Refuse a parameter that is listed twice, and parameters that lie on the same memory.

    Raises:
        ValueError: the norm of the gradient would count the memory twice, and a perturbation would move it twice.
    """
    if len({id(t) for t in tensors}) < len(tensors):
        raise ValueError("params must hold every parameter once: one is listed twice")
    end: dict[int, int] = {}  # by storage, the first byte that no parameter covers
    for storage, start, stop in sorted(span for t in tensors if (span := _span(t)) is not None):
        if start < end.get(storage, 0):
            raise ValueError(
                "params must not share memory: two parameters lie on the same. To tie weights, register one Parameter "
                "twice (decoder.weight = encoder.weight), not its memory (decoder.weight.data = encoder.weight.data)"
            )
        end[storage] = stop


def _span(t: Tensor) -> tuple[int, int, int] | None:
    """Return the storage of a plain tensor and its first and last byte there; ``None`` where they do not say enough."""
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and t.numel() > 0
    if not plain or t.untyped_storage().data_ptr() == 0:
        return None
    covered = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    size = t.numel() if covered == t.numel() else 1  # another parameter may lie in the gaps of a strided one
    return t.untyped_storage().data_ptr(), t.data_ptr(), t.data_ptr() + size * t.element_size()
