"""A ``GradScaler``'s part in a step of several passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from steppe.batch import Batch
from steppe.engine import checks


class _Taker:
    """Stands for one pass of a step: a scaler keeps one record per optimizer, so every pass poses as one."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = []


# A scaler keeps its records by address: no address is to be used again while it lives.
_ALIVE: WeakKeyDictionary[torch.amp.GradScaler, list[list[_Taker]]] = WeakKeyDictionary()


class Scaling:
    """The scalers of an optimizer's steps."""

    def __init__(self) -> None:
        self._last: LossScale | None = None

    def of_step(self, closure: Any, scaler: torch.amp.GradScaler | None) -> tuple[Any, LossScale | None]:
        """Return the closure, and the scale of its gradients.

        Raises:
            TypeError: ``scaler`` is none.
            ValueError: it is not the batch's.
        """
        checks.grad_scaler(scaler)
        if isinstance(closure, Batch):
            if scaler is not None and closure.scaler not in (None, scaler):
                raise ValueError("scaler must be the one of the batch")
            closure = closure if scaler is None else closure.scaled_by(scaler)
            scaler = closure.scaler
        if scaler is None or not scaler.is_enabled():
            return closure, None
        if self._last is None or self._last.scaler is not scaler:
            self._last = LossScale(scaler)
        return closure, self._last

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Scaling, ()  # what a scaler knows is of its own process


class LossScale:
    """Unscales the gradients of every pass, and lets the scaler know of an overflow in any of them.

    ``GradScaler.unscale_`` accepts one call an optimizer between two ``update()``; here every pass is one optimizer,
    the same at every step, so that a forgotten ``update()`` is noticed. A step that raised or was cancelled is no
    reason for one: the next takes others. Nothing else of the scaler is touched.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self._takers: list[_Taker] = []
        _ALIVE.setdefault(scaler, []).append(self._takers)
        self._used = 0

    def end(self) -> None:
        """End the step."""
        self._used = 0

    def unscale(self, parameters: Sequence[Tensor]) -> None:
        """Divide the gradients of ``parameters`` by the scale, in place.

        Raises:
            RuntimeError: the scaler was not updated since the last step.
        """
        if self._used == len(self._takers):
            self._takers.append(_Taker())
        taker = self._takers[self._used]
        self._used += 1
        taker.param_groups = [{"params": parameters}]
        try:
            self.scaler.unscale_(taker)  # type: ignore[arg-type]
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
            self._used -= 1  # asked again, it says so again
            raise RuntimeError("call scaler.update() after every optimizer.step(..., scaler=scaler)") from None
        finally:
            taker.param_groups = []

    def watch(self, numbers: Tensor) -> None:
        """Report an overflow if numbers made of scaled gradients are not finite; no wait for their device."""
        p = torch.zeros_like(numbers)
        p.grad = numbers.detach().clone()
        self.unscale([p])

    def overflow(self, device: torch.device) -> None:
        """Report an overflow that another rank saw."""
        self.watch(torch.full((1,), torch.inf, device=device))
