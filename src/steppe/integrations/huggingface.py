"""The passes of a sharpness-aware step inside the Hugging Face Trainer's ``training_step``."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from steppe.integrations.accelerate import backward, sharpness_aware
from steppe.optimizer import SharpnessAware

LOGGED = ("rho", "gap", "g_norm", "eps_norm", "g_adv_norm", "passes", "skipped")  # of the telemetry

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object  # a mixin: the user's class brings the Trainer


class SharpnessAwareTrainerMixin(_Trainer):
    """Mixin for any sharpness-aware ``Trainer``: ``class MyTrainer(SharpnessAwareTrainerMixin, Trainer)``.

    The Trainer calls ``optimizer.step()`` without a closure. So the mixin's ``training_step`` keeps an update's
    micro-batches. At the last one it runs all of them, once for each pass, by the Trainer's ``training_step``, so that
    ``compute_loss``, label smoothing, ``num_items_in_batch``, autocast and DDP work unchanged. Then ``p.grad`` is the
    gradient for the base optimizer: ``max_grad_norm`` clips it once, and ``grad_norm`` is its norm. The update's
    micro-batches are held in the collator's form, usually on the CPU.

    Training logs gain the telemetry of the last step as ``sharpness_gap``, ``sharpness_eps_norm`` and so on.

    Args:
        sharpness: returns the sharpness-aware optimizer around the Trainer's. Not needed if ``optimizers=`` or
            ``create_optimizer`` gives a steppe optimizer.

    Raises:
        TypeError: the mixin comes after ``Trainer``; or, in ``train``, there is no steppe optimizer.
        NotImplementedError: in ``train``, under DeepSpeed, FSDP, Megatron or XLA.

    Example:
        >>> sam = lambda base: steppe.SAM(base, rho=0.05)
        >>> trainer = SharpnessAwareTrainer(model, args, train_dataset=data, sharpness=sam)
        >>> trainer.train()
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.create_optimizer is Trainer.create_optimizer:
            raise TypeError(f"class {cls.__name__}: SharpnessAwareTrainerMixin must come before Trainer")

    def __init__(
        self, *args: Any, sharpness: Callable[[torch.optim.Optimizer], SharpnessAware] | None = None, **kwargs: Any
    ) -> None:
        self._sharpness = sharpness
        self._kept: list[Callable[[], Tensor]] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's optimizer, made sharpness-aware by ``sharpness`` unless it is already."""
        self._kept = []  # an earlier training may have left an update unfinished
        optimizer = super().create_optimizer(*args, **kwargs)
        if not isinstance(getattr(optimizer, "optimizer", optimizer), SharpnessAware):
            if self._sharpness is None:
                raise TypeError(
                    "the Trainer has no steppe optimizer: pass sharpness=lambda base: steppe.SAM(base, rho=0.05), or "
                    f"optimizers=(steppe.SAM(base), scheduler); its optimizer is {type(optimizer).__name__}"
                )
            self.optimizer = self._sharpness(optimizer)
        return self.optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the micro-batch and return 0; at an update's last one run all passes and return the loss at ``w``."""
        optimizer = sharpness_aware(self.accelerator, self.optimizer)
        self._kept.append(partial(super().training_step, model, *args, **kwargs))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        passes, self._kept = self._kept, []
        return backward(self.accelerator, model, optimizer, passes)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the telemetry of the last step to the training logs."""
        if "loss" in logs:
            telemetry = sharpness_aware(self.accelerator, self.optimizer).telemetry
            seen = {name: getattr(telemetry, name) for name in LOGGED}
            logs |= {f"sharpness_{name}": float(value) for name, value in seen.items() if value is not None}
        super().log(logs, *args, **kwargs)


class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, Trainer):
    """``transformers.Trainer`` with ``sharpness=``: see :class:`SharpnessAwareTrainerMixin`."""


SharpnessAwareMixin = SharpnessAwareTrainerMixin  # the name in steppe 0.1
