"""Float32 stand-ins for parameters in low precision, so that products are float32's at the weights a model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steppe.batch import Data
from steppe.engine.vector import LOW, wide


class StandIns:
    """Leaves in at least float32 with the parameters' values."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.leaves = [wide(p.detach()).clone().requires_grad_() for p in parameters]
        self._of = {id(p): leaf for p, leaf in zip(parameters, self.leaves, strict=True)}

    def refresh(self) -> None:
        """Take the parameters' values: they may have moved."""
        with torch.no_grad():
            for leaf, p in zip(self.leaves, self.parameters, strict=True):
                leaf.copy_(p)

    def around(self, f: Callable[[nn.Module, Data], Tensor]) -> Callable[[nn.Module, Data], Tensor]:
        """``f`` of a model whose parameters and buffers are all in at least float32."""

        def f_wide(model: nn.Module, data: Data) -> Tensor:
            holder = _Holder(model, f)
            state = {name: self._of.get(id(p), wide(p.detach())) for name, p in holder.named_parameters()}
            state |= {name: wide(b) if b.dtype in LOW else b for name, b in holder.named_buffers()}
            found: Tensor = functional_call(holder, state, (data,))
            return found

        return f_wide


def pure(
    model: nn.Module, f: Callable[[nn.Module, Data], Tensor], parameters: Sequence[Tensor]
) -> Callable[[list[Tensor], Data], Tensor]:
    """``(w, data) -> sum of f(model, data)`` at ``w`` in place of the parameters: for function transforms."""
    holder = _Holder(model, f)
    names = {id(p): name for name, p in holder.named_parameters()}

    def f_of_w(w: list[Tensor], data: Data) -> Tensor:
        state = {names[id(p)]: t for p, t in zip(parameters, w, strict=True)}
        found: Tensor = functional_call(holder, state, (data,))
        return found.sum()

    return f_of_w


class _Holder(nn.Module):
    """``functional_call`` calls a module: this one is any function of a model and data."""

    def __init__(self, model: nn.Module, f: Callable[[nn.Module, Data], Tensor]) -> None:
        super().__init__()
        self.model, self.f = model, f

    def forward(self, data: Data) -> Tensor:
        return self.f(self.model, data)
