"""Float32 copies of parameters in low precision, so that products are float32's at the weights that a model has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steppe.batch import Data
from steppe.engine.functional import ModelFunction, functional
from steppe.engine.vector import LOW, wide


class StandIns:
    """Leaf tensors in at least float32 with the parameters' values."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.leaves = [wide(p.detach()).clone().requires_grad_() for p in parameters]
        self._of = {id(p): leaf for p, leaf in zip(parameters, self.leaves, strict=True)}

    def refresh(self) -> None:
        """Copy the parameters' values, which may have changed."""
        with torch.no_grad():
            for leaf, p in zip(self.leaves, self.parameters, strict=True):
                leaf.copy_(p)

    def around(self, f: ModelFunction) -> ModelFunction:
        """Return ``f`` of a model whose parameters and buffers are all in at least float32."""

        def f_wide(model: nn.Module, data: Data) -> Tensor:
            tensors = {name: self._of.get(id(p), wide(p.detach())) for name, p in model.named_parameters()}
            tensors |= {name: wide(b) if b.dtype in LOW else b for name, b in model.named_buffers()}
            return functional(model, f)(tensors, data)

        return f_wide
