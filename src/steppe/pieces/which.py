"""Which parameters a geometry adapts."""

from collections.abc import Callable
from dataclasses import dataclass

from steppe.engine.oracle import Oracle

Which = Callable[[Oracle], list[bool]]


@dataclass(frozen=True)
class Matrices:
    """Parameters with two or more dimensions: weights of linear, convolution and embedding layers."""

    def __call__(self, f: Oracle) -> list[bool]:
        return [w is not None and w.dim() > 1 for w in f.w.tensors]


@dataclass(frozen=True)
class Named:
    """Parameters whose name contains ``part``: with "weight" the ASAM authors' choice, normalisation weights included.

    Args:
        part: what the name has to contain.

    Raises:
        TypeError: in ``step``, where the base optimizer was not made from ``model.named_parameters()``.
    """

    part: str = "weight"

    def __call__(self, f: Oracle) -> list[bool]:
        if f.names is None:
            raise TypeError(
                f"Named({self.part!r}) needs parameter names: make the base optimizer from model.named_parameters()"
            )
        return [self.part in name for name in f.names]


@dataclass(frozen=True)
class Everything:
    """Every parameter, biases included: the choice of the widely copied davda54/sam. Its rho is not ASAM's."""

    def __call__(self, f: Oracle) -> list[bool]:
        return [True] * len(f.w.tensors)
