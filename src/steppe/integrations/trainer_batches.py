"""An update of the Hugging Face Trainer as batches: of its micro-batches, of parts of them, of single examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from steppe.batch import Batch, Batches
from steppe.engine.nested import Data, Examples
from steppe.integrations.parts import FrameworkUpdate, MicroBatch

IGNORED = -100  # a label that the loss leaves out
RECORDS = ("_metrics", "_stored_metrics", "_total_train_tokens", "_step", "_current_train_step_time")  # TRL's
PAIRED = ("DPOTrainer", "RewardTrainer")  # of TRL: the first half of the rows is chosen, the second rejected
Losses = Callable[[nn.Module, dict[str, Any]], Tensor]


@dataclass
class Kept:
    """One micro-batch of an update, and how the Trainer runs it.

    Args:
        trainer: the Trainer.
        step: its ``training_step``, without the mixin's.
        model: the model that it trains, with its wrapper.
        inputs: what the collator returned.
        num_items: the labels in the whole update, on all ranks; ``None`` where the Trainer does not count them.
        more: further arguments of ``training_step``.
        prepared: the inputs, where preparing them is more than moving them to the device.
    """

    trainer: Any
    step: Callable[..., Tensor]
    model: nn.Module
    inputs: dict[str, Any]
    num_items: Any
    more: tuple[tuple[Any, ...], dict[str, Any]]
    prepared: Any
    accumulated: float = field(init=False)  # by how many micro-batches the Trainer divides the loss
    seen: bool = False

    def __post_init__(self) -> None:
        self.accumulated = self.trainer.current_gradient_accumulation_steps

    def run(self) -> Tensor:
        """Run the Trainer's forward and backward, and return its share of the loss."""
        first, self.seen = not self.seen, True
        return self._run(self.inputs, self.num_items, first)

    def run_part(self, data: dict[str, Any], scale: float, first: bool) -> Tensor:
        """Run forward and backward of ``scale`` times the mean over some examples, and return that."""
        with self._as_mean(data, scale) as num_items:
            return self._run(data, num_items, first)

    def mean(self, data: dict[str, Any]) -> Tensor:
        """Run one forward and return the mean over some examples."""
        if type(self.trainer).compute_loss is not Trainer.compute_loss:
            raise NotImplementedError("compute_loss may keep records")
        with self._as_mean(data, 1.0) as num_items, self.trainer.compute_loss_context_manager():
            inputs = self.trainer._prepare_inputs(data)
            loss: Tensor = self.trainer.compute_loss(self.model, inputs, num_items_in_batch=num_items)
            return loss

    def items(self, data: dict[str, Any]) -> float:
        """Return how many labels the mean over some examples is taken over; without labels, the examples."""
        labels = data.get("shift_labels", data.get("labels"))
        if not isinstance(labels, Tensor):
            return self.examples(data).n
        if "shift_labels" not in data and getattr(self.trainer, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        return float((labels != IGNORED).sum())

    def examples(self, data: dict[str, Any]) -> Examples:
        """Find the examples of inputs."""
        found = Examples.of(data)
        paired = any(c.__name__ in PAIRED for c in type(self.trainer).__mro__)
        return Pairs(found.n // 2, found.lists) if paired else found

    @property
    def share(self) -> float:
        """The share of this micro-batch's mean in the update's loss, as the Trainer weighs it."""
        if not self._scaled:
            return 1 / self.accumulated
        return 1.0 if self.num_items is None else self.items(self.inputs) * self.factor / float(self.num_items)

    @property
    def factor(self) -> float:
        """What the Trainer multiplies losses by, whose sums are divided by the labels of all ranks."""
        trainer = self.trainer
        if self.num_items is None or not trainer.args.average_tokens_across_devices:
            return 1.0
        return float(trainer.accelerator.num_processes // getattr(trainer, "get_tp_size", lambda: 1)())

    @property
    def _scaled(self) -> bool:
        """Whether the loss is a sum divided by ``num_items``, which the Trainer does not divide again."""
        trainer = self.trainer
        known = getattr(trainer, "loss_is_scaled_for_ga", None)
        if known is not None:
            return bool(known)
        return (trainer.model_accepts_loss_kwargs and self.num_items is not None) or (
            trainer.compute_loss_func is not None
        )

    @contextmanager
    def _as_mean(self, data: dict[str, Any], scale: float) -> Iterator[Any]:
        """Make the Trainer's loss ``scale`` times the mean over these data; yield the number of items to give it."""
        trainer, num_items = self.trainer, self.num_items
        if num_items is not None:
            num_items = torch.as_tensor(self.items(data) * self.factor / scale, device=trainer.args.device)
        before = trainer.current_gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = 1 / scale
        try:
            yield num_items
        finally:
            trainer.current_gradient_accumulation_steps = before

    def _run(self, inputs: dict[str, Any], num_items: Any, first: bool) -> Tensor:
        trainer = self.trainer
        kept = {} if first else {name: deepcopy(getattr(trainer, name)) for name in RECORDS if hasattr(trainer, name)}
        trainer._held, trainer.further_pass = copy(self.prepared), not first
        try:
            return self.step(self.model, inputs, num_items, *self.more[0], **self.more[1])
        finally:
            trainer._held, trainer.further_pass = None, False
            for name, value in kept.items():
                setattr(trainer, name, value)


@dataclass(frozen=True)
class Pairs(Examples):
    """Pairs of rows: of ``2 n`` rows, pair ``i`` is row ``i`` and row ``n + i``."""

    def cut(self, data: Data, index: slice | Tensor) -> Data:
        """Return the pairs of a slice, or those with these indices."""
        chosen = torch.arange(self.n)[index.cpu() if isinstance(index, Tensor) else index]
        return super().cut(data, torch.cat([chosen, self.n + chosen]))


def update_of(micro_batches: Sequence[Kept], whole: Callable[[], Tensor]) -> FrameworkUpdate:
    """Return the update as a batch that can be cut; ``whole`` runs all micro-batches.

    Raises:
        NotImplementedError: the inputs have no parts that would be examples.
    """
    for kept in micro_batches:
        _refuse(kept)
    batches = [
        MicroBatch(k.model, k.inputs, k.run_part, k.share, items=k.items, value=k.mean, examples=k.examples(k.inputs))
        for k in micro_batches
    ]
    return FrameworkUpdate(batches, whole)


def _refuse(kept: Kept) -> None:
    """Refuse inputs that cannot be cut into examples, with the reason."""
    trainer, inputs = kept.trainer, kept.inputs
    why = ""
    if kept.prepared is not None:
        why = f"{type(trainer).__name__} prepares its inputs by itself, such as generated completions"
    elif getattr(trainer, "calculate_KL", False):
        why = "the loss of every text contains the mean KL divergence of the batch"
    elif getattr(trainer, "padding_free", False) or "cu_seq_lens_q" in inputs or _flattened(inputs):
        why = "padding-free inputs are one row; collate with padding"
    elif trainer.args.n_gpu > 1:
        why = "DataParallel splits the inputs; start one process for each GPU"
    if why:
        raise NotImplementedError(f"m=, sampled= and ascent= cut the inputs along the first dimension, but {why}")


def _flattened(inputs: dict[str, Any]) -> bool:
    rows = inputs.get("input_ids")
    return isinstance(rows, Tensor) and rows.shape[0] == 1 and "position_ids" in inputs


def example_batches(micro_batches: Sequence[Kept], losses: Losses | None, rule: object) -> Batches:
    """Return the update as batches of single examples, whose mean is the Trainer's loss.

    Raises:
        TypeError: there are no ``losses``.
    """
    if losses is None:
        raise TypeError(
            f"this method looks at single examples ({rule!r}): pass losses=, a function (model, inputs) -> sums of the "
            "losses of every example's labels, shape (n,), such as steppe.integrations.huggingface.causal_lm_losses or "
            "classification_losses"
        )
    if micro_batches[0].prepared is not None:
        _refuse(micro_batches[0])
    n = sum(Examples.of(k.inputs).n for k in micro_batches)
    return Batches([_by_example(k, losses, n) for k in micro_batches])


def _by_example(kept: Kept, losses: Losses, n: int) -> Batch:
    factor = n * kept.share / max(kept.items(kept.inputs), 1.0)

    def loss(model: nn.Module, data: dict[str, Any]) -> Tensor:
        inputs = kept.trainer._prepare_inputs(data)
        with kept.trainer.compute_loss_context_manager():
            return losses(model, inputs).float() * factor

    return Batch(kept.model, loss, kept.inputs)


def causal_lm_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the sum of the losses of every text's tokens, shape ``(n,)``, for a causal language model."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
    losses = cross_entropy(
        logits.float().transpose(1, 2), inputs["labels"][:, 1:], reduction="none", ignore_index=IGNORED
    )
    return losses.sum(1)


def classification_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the cross-entropy of every example, shape ``(n,)``, for a model with ``logits`` of shape ``(n, k)``."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return cross_entropy(logits.float(), inputs["labels"], reduction="none")
