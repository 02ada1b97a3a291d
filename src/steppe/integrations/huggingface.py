"""The passes of a sharpness-aware step inside the Hugging Face Trainer's ``training_step``."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from steppe.integrations.accelerate import accumulated, sharpness_aware
from steppe.integrations.parts import seen_by
from steppe.integrations.trainer_batches import Kept, example_batches, update_of
from steppe.integrations.trainer_batches import causal_lm_losses as causal_lm_losses
from steppe.integrations.trainer_batches import classification_losses as classification_losses
from steppe.optimizer import SharpnessAware
from steppe.pieces.protocol import declared

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
    micro-batches are held in the collator's form, usually on the CPU; where the Trainer prepares inputs in a way of its
    own (GRPO generates there), they are prepared once and held.

    ``m=``, ``sampled=`` and ``ascent=`` run ``training_step`` on parts of the inputs, cut along the first dimension.
    Parts weigh by their labels other than -100, as in the Trainer's mean. RW-SAM and ESAM look at single examples and
    need ``losses=``.

    Training logs gain the telemetry of the last step as ``sharpness_gap``, ``sharpness_eps_norm`` and so on. Metrics
    that the Trainer keeps (TRL's) count the first pass alone.

    Args:
        sharpness: returns the sharpness-aware optimizer around the Trainer's. Not needed if ``optimizers=`` or
            ``create_optimizer`` gives a steppe optimizer.
        losses: ``(model, inputs) -> sums``, shape ``(n,)``: for every example, the sum of the losses of its labels.
            :func:`causal_lm_losses` and :func:`classification_losses` are such functions.

    Raises:
        TypeError: the mixin comes after ``Trainer``; or, in ``train``, there is no steppe optimizer, or the method
            looks at single examples and there are no ``losses``.
        NotImplementedError: in ``train``, under DeepSpeed, FSDP 1, Megatron or XLA; or ``m=`` where the inputs cannot
            be cut: padding-free rows, or inputs that the Trainer generates.

    Example:
        >>> sam = lambda base: steppe.SAM(base, rho=0.05, m=1, sampled=1)  # nearly the price of the base optimizer
        >>> trainer = SharpnessAwareTrainer(model, args, train_dataset=data, sharpness=sam)
        >>> trainer.train()
    """

    further_pass = False  #: True while ``compute_loss`` runs for examples that it has seen in this update

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.create_optimizer is Trainer.create_optimizer:
            raise TypeError(f"class {cls.__name__}: SharpnessAwareTrainerMixin must come before Trainer")

    def __init__(
        self,
        *args: Any,
        sharpness: Callable[[torch.optim.Optimizer], SharpnessAware] | None = None,
        losses: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self._sharpness, self._losses = sharpness, losses
        self._kept: list[Kept] = []
        self._held: Any = None  # the prepared inputs of the pass that runs
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

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Keep the micro-batch and return 0; at an update's last one run all passes and return the loss at ``w``."""
        optimizer = sharpness_aware(self.accelerator, self.optimizer)
        step, prepared = super().training_step, self._prepared(model, inputs)
        self._kept.append(Kept(self, step, model, inputs, num_items_in_batch, (args, kwargs), prepared))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        kept, self._kept = self._kept, []
        if prepared is not None and hasattr(self, "_step"):
            self._step -= len(kept)  # the first pass counts them again
        passes = accumulated(self.accelerator, model, [one.run for one in kept])
        closure: Any = passes
        needs = declared(optimizer.rule)
        if optimizer.radius() and needs.examples:
            closure = example_batches(kept, self._losses, optimizer.rule)
        elif optimizer.radius() and needs.parts:
            closure = update_of(kept, passes)
        loss: Tensor = optimizer.backward(closure, scaler=self.accelerator.scaler, rescale=True)
        return loss

    def _prepared(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Prepare inputs where that is more than moving them to the device: once, before the passes."""
        prepare = super()._prepare_inputs
        if getattr(prepare, "__func__", None) is Trainer._prepare_inputs:
            return None
        model.train()
        prepared = prepare(inputs)
        if hasattr(self, "_step"):  # TRL's counter of micro-batches chooses the inputs
            self._step += 1
        return prepared

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that are held for all passes, or prepare them."""
        held: dict[str, Any] = super()._prepare_inputs(inputs) if self._held is None else self._held
        return held

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the telemetry of the last step to the training logs."""
        if "loss" in logs:
            seen = seen_by(sharpness_aware(self.accelerator, self.optimizer))
            logs |= {name: float(value) for name, value in seen.items()}
        super().log(logs, *args, **kwargs)


class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, Trainer):
    """``transformers.Trainer`` with ``sharpness=``: see :class:`SharpnessAwareTrainerMixin`."""


SharpnessAwareMixin = SharpnessAwareTrainerMixin  # the name in steppe 0.1
