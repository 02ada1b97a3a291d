"""What a rule returns."""

from __future__ import annotations

from dataclasses import dataclass

from steppe.vector import Scalar, Vector


@dataclass(frozen=True)
class Update:
    """A step: ``grad`` goes through the base optimizer, ``beside`` past it, ``w <- w - lr beside``."""

    grad: Vector
    beside: Vector | None = None

    def __rmul__(self, c: Scalar) -> Update:
        return Update(c * self.grad, None if self.beside is None else c * self.beside)

    def __add__(self, other: Update) -> Update:
        if self.beside is None or other.beside is None:
            return Update(self.grad + other.grad, self.beside or other.beside)
        return Update(self.grad + other.grad, self.beside + other.beside)
