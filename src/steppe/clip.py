"""Clipping of what the base optimizer sees: once, at the end of a step."""

from __future__ import annotations

from steppe.update import Update


def clipped(update: Update, max_norm: float) -> Update:
    """``min(1, max_norm / norm(u)) u``, with ``u`` the gradient that the base sees, over all parameters and shards.

    What moves beside the base (WSAM's sharpness term) is scaled by the same factor, so that it keeps its weight against
    the loss. (The authors of WSAM clip ``g`` and ``g_adv`` each by itself, in their code; the paper says nothing.) The
    factor stays on its device, as ``torch.nn.utils.clip_grad_norm_`` has it.

    Example:
        >>> optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, max_norm=1.0)
    """
    return (max_norm / (update.grad.norm() + 1e-6)).clamp(max=1.0) * update
