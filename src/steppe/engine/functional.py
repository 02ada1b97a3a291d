"""Functions of a model and data, called with other tensors in place of the model's."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn
from torch.func import functional_call

from steppe.engine.nested import Data

ModelFunction = Callable[[nn.Module, Data], Tensor]


class _Holder(nn.Module):
    """A function of a model as a module, because ``torch.func.functional_call`` takes modules alone."""

    def __init__(self, model: nn.Module, f: ModelFunction) -> None:
        super().__init__()
        self.model, self.f = model, f

    def forward(self, data: Data) -> Tensor:
        return self.f(self.model, data)


def functional(model: nn.Module, f: ModelFunction) -> Callable[[Mapping[str, Tensor], Data], Tensor]:
    """Return ``(tensors, data) -> f(model, data)`` with ``tensors`` for the model's parameters and buffers, by name.

    Example:
        >>> losses = functional(batch.model, batch.loss)
        >>> losses({"weight": torch.zeros(3, 4)}, batch.data)
    """
    holder = _Holder(model, f)
    return lambda tensors, data: functional_call(holder, {f"model.{name}": t for name, t in tensors.items()}, (data,))
