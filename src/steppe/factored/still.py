"""A rehearsal's surroundings: no dropout, no weight exactly at its start, and everything put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DROPS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


class NoDropout(TorchFunctionMode):
    """Dropout keeps everything, so that a part of the batch can be compared with the whole."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if "dropout_p" in kwargs else {}
        return func(*args, **kwargs)


@contextmanager
def shaken(model: nn.Module) -> Iterator[None]:
    """A little noise on every parameter, taken back bit for bit: at zero a branch would hide what it does."""
    parameters: list[Tensor] = [p for p in model.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.add_(_noise(p, i))
        yield
    finally:
        if parameters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)


def _noise(p: Tensor, seed: int) -> Tensor:
    random = torch.Generator(device=p.device).manual_seed(seed)
    size = p.float().square().mean().sqrt() * 0.05 + 0.01
    return (torch.randn(p.shape, generator=random, device=p.device) * size).to(p.dtype)
