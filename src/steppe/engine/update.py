"""What a rule returns."""

from __future__ import annotations

from dataclasses import dataclass

from steppe.engine.vector import Scalar, Vector


@dataclass(frozen=True)
class Update:
    """A step: ``grad`` goes through the base optimizer, ``beside`` past it, ``w <- w - lr beside``.

    Args:
        grad: what the base optimizer gets as the gradient.
        beside: what moves the weights directly, times each group's ``lr``; ``None`` is nothing.
    """

    grad: Vector
    beside: Vector | None = None

    def __rmul__(self, c: Scalar) -> Update:
        return Update(c * self.grad, None if self.beside is None else c * self.beside)

    def __add__(self, other: Update) -> Update:
        if self.beside is None or other.beside is None:
            return Update(self.grad + other.grad, self.beside or other.beside)
        return Update(self.grad + other.grad, self.beside + other.beside)

    def clipped(self, max_norm: float) -> Update:
        """Return ``min(1, max_norm / norm(u)) u``, ``u`` the base's gradient, over all parameters and shards.

        ``beside`` (WSAM's sharpness term) is scaled by the same factor, so that it keeps its weight against the loss.
        (The authors of WSAM clip ``g`` and ``g_adv`` separately, in their code; the paper does not mention clipping.)
        The factor stays on its device, as in ``torch.nn.utils.clip_grad_norm_``.

        Example:
            >>> optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, max_norm=1.0)
        """
        return (max_norm / (self.grad.norm() + 1e-6)).clamp(max=1.0) * self
