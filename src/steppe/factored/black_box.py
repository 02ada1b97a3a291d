"""Registered modules: any small module, its per-example gradients by ``torch.func``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from steppe.engine.functional import functional
from steppe.factored.batch_norm import update_running_statistics
from steppe.factored.passes import FirstPass, SecondPass
from steppe.factored.sites import Interception, Matrices, Site, Small
from steppe.factored.tracked import CannotFactor

_registered: set[type[nn.Module]] = set()


def register_factored(module_type: type[nn.Module]) -> type[nn.Module]:
    """Let micro-batches share passes through modules of this type, whatever they do with their parameters.

    Register a module whose parameters are used by operations that have no factored form. It must map one tensor to one
    tensor, both with the examples first, treat each example alone, and draw no random numbers. ``torch.func.vmap`` must
    be able to run it. Every example gets a copy of the module's parameters, so the module should be small.

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
def black_boxes(model: nn.Module, passing: Interception) -> Iterator[None]:
    """Enter a pass in which registered modules with perturbed parameters run as one layer each.

    Running statistics are updated at its end.
    """
    modules = model.modules() if _registered else ()
    found = [m for m in modules if type(m) in _registered and "forward" not in vars(m) and _names(m, passing)]
    for module in found:
        module.forward = partial(_run, BlackBox(module, _names(module, passing)), passing)
    passing.running = True
    try:
        with passing:
            yield
        if isinstance(passing, SecondPass):
            passing.check()
        else:
            update_running_statistics(model, passing)
    finally:
        passing.running = False
        for module in found:
            del module.forward  # the class's own again


def _run(box: BlackBox, passing: Interception, x: Tensor) -> Tensor:
    with (
        passing.understood(),
        torch._C.DisableTorchFunction(),
    ):  # the functions that the module calls are not intercepted
        y: Tensor = getattr(box, passing.method)(passing, x)
        return y


def _names(module: nn.Module, passing: Interception) -> dict[str, int]:
    found = {name: passing.tracked.index(p) for name, p in module.named_parameters()}
    return {name: i for name, i in found.items() if i is not None}


@dataclass(frozen=True)
class BlackBox:
    """A module as one layer."""

    module: nn.Module
    names: dict[str, int]  # of its perturbed parameters -> index

    @property
    def key(self) -> int:
        """What tells it from others, and keeps no module alive."""
        return id(self.module)

    def record(self, first: FirstPass, x: Tensor) -> Tensor:
        """Run the module, and keep its input."""
        if x.dim() == 0 or len(x) != first.tracked.n:
            raise CannotFactor(f"{type(self.module).__name__} is registered but has no example dimension first")
        y: Tensor = type(self.module).forward(self.module, x)
        return first.watch(y, Site(self, None, None, x.detach(), (len(x),)))

    def collect(self, site: Site, matrices: Matrices, small: Small) -> None:
        """Add the per-example gradients of the module's parameters."""
        assert site.kept is not None
        p = {name: t.detach() for name, t in self.module.named_parameters()}

        def inner(mine: dict[str, Tensor], x: Tensor, delta: Tensor) -> Tensor:
            return (self.run(p | mine, x) * delta).sum()

        mine = {name: p[name] for name in self.names}
        gradients = vmap(grad(inner), (None, 0, 0))(mine, site.kept, site.deltas[0])
        for name, i in self.names.items():
            small.setdefault(i, []).append(gradients[name])

    def evaluate(self, second: SecondPass, x: Tensor) -> Tensor:
        """Run every example with the parameters of its micro-batch."""
        second.next(self, None, None)
        p = dict(self.module.named_parameters())
        mine = {name: p[name] + second.parts.spread(second.small[i]) for name, i in self.names.items()}
        y: Tensor = vmap(lambda mine, x: self.run(p | mine, x))(mine, x)
        return y

    def run(self, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """Run the module on one example."""
        of_its_class = functional(self.module, lambda module, x: type(module).forward(module, x))
        return of_its_class(p, x[None])[0]
