"""Modules of one's own, example by example."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from steppe.factored.tape import CannotFactor, Look, Matrices, See, Site, Small, Tape

_registered: set[type[nn.Module]] = set()


def register_factored(module_type: type[nn.Module]) -> type[nn.Module]:
    """Let micro-batches share passes through modules of this type, whatever they do with their parameters.

    For a module whose parameters meet operations that have no factored form. It must map one tensor with the examples
    first to one tensor with the examples first, each example by itself and without random numbers; ``torch.func.vmap``
    must be able to run it. Every example then has its own copy of the module's parameters, so it should be a small one.

    Args:
        module_type: the class; also usable as its decorator.

    Returns:
        The class.

    Raises:
        TypeError: ``module_type`` is no class of modules.

    Example:
        >>> register_factored(nn.PReLU)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a class of modules, got {module_type!r}")
    _registered.add(module_type)
    return module_type


@contextmanager
def black_boxes(model: nn.Module, tape: Tape) -> Iterator[None]:
    """Inside, registered modules with perturbed parameters run as operations of the tape."""
    modules = model.modules() if _registered else ()
    found = [m for m in modules if type(m) in _registered and "forward" not in vars(m) and _names(m, tape)]
    for module in found:
        module.forward = partial(_run, BlackBox(module), tape)
    try:
        with tape:
            yield
    finally:
        for module in found:
            del module.forward  # the class's own again


def _run(box: BlackBox, tape: Tape, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # what the module does inside is its own
        return box.look(tape, x) if isinstance(tape, Look) else box.see(cast(See, tape), x)


def _names(module: nn.Module, tape: Tape) -> dict[str, int]:
    found = {name: tape.tracked.index(p) for name, p in module.named_parameters()}
    return {name: i for name, i in found.items() if i is not None}


@dataclass(frozen=True)
class BlackBox:
    """A module as one operation."""

    module: nn.Module

    def look(self, look: Look, x: Tensor) -> Tensor:
        """Run it, and keep the input."""
        if x.dim() == 0 or len(x) != look.tracked.n:
            raise CannotFactor(f"{type(self.module).__name__} is registered but has no example dimension first")
        y: Tensor = type(self.module).forward(self.module, x)
        site = Site(self, None, None, x.detach(), (len(x),), (_names(self.module, look),))
        return look.record(y, site)

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Every example's gradient."""
        names = site.static[0]
        assert site.kept is not None
        p = {name: t.detach() for name, t in self.module.named_parameters()}

        def inner(mine: dict[str, Tensor], x: Tensor, delta: Tensor) -> Tensor:
            return (self.run(p | mine, x) * delta).sum()

        mine = {name: p[name] for name in names}
        gradients = vmap(grad(inner), (None, 0, 0))(mine, site.kept, site.deltas[0])
        for name, i in names.items():
            small.setdefault(i, []).append(gradients[name])

    def see(self, see: See, x: Tensor) -> Tensor:
        """Every example with the parameters of its micro-batch."""
        see.next(self, None, None)
        p = dict(self.module.named_parameters())
        mine = {name: p[name] + see.parts.spread(see.small[i]) for name, i in _names(self.module, see).items()}
        y: Tensor = vmap(lambda mine, x: self.run(p | mine, x))(mine, x)
        return y

    def run(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """The module on one example."""
        y: Tensor = functional_call(_Own(self.module), {f"module.{k}": v for k, v in p.items()}, (x[None],))[0]
        return y


class _Own(nn.Module):
    """A module with the forward of its class, whatever has been put in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """The class's."""
        return type(self.module).forward(self.module, x)
