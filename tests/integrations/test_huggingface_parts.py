"""Parts of the batch, and single examples, inside the Trainer: token means, accumulation, ignored labels."""

from functools import partial

import pytest
import torch
from torch import nn

import steppe
from tests.integrations.helpers import Net, batches, grouped, llama, same, sgd
from tests.integrations.test_huggingface import Digits, InOrder, Model, Sequential, arguments

transformers = pytest.importorskip("transformers")

from steppe.integrations.huggingface import (  # noqa: E402
    SharpnessAwareTrainer,
    causal_lm_losses,
    classification_losses,
)

PARTS = {
    "m": lambda base, rho=0.1: steppe.SAM(base, rho=rho, m=4),
    "sampled": lambda base, rho=0.1: steppe.SAM(base, rho=rho, m=2, sampled=2),
    "ascent": lambda base, rho=0.1: steppe.SAM(base, rho=rho, ascent=4),
    "USAM": lambda base, rho=0.1: steppe.USAM(base, rho=rho, m=4),  # a wrong scale of a part's loss would show
    "WSAM": lambda base, rho=0.1: steppe.WSAM(base, rho=rho, m=4, sampled=2),
}
IGNORED = -100


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- a mean over examples, not over tokens


@pytest.mark.parametrize(("name", "k"), [("sampled", 1), *((name, 3) for name in PARTS)])
def test_classification_is_the_mean_batch(name: str, k: int, tmp_path) -> None:
    model, other = Model(), Net()
    args = arguments(tmp_path, k, 3, max_grad_norm=0.0, lr_scheduler_type="constant")
    trainer = Sequential(model, args, train_dataset=Digits(48 * k), sharpness=PARTS[name])
    trainer.train()
    optimizer = PARTS[name](sgd(other))
    optimizer.base.param_groups[0]["momentum"] = 0.0
    torch.set_rng_state(model.random[0])
    loss = lambda m, d: nn.functional.cross_entropy(m(d[0]), d[1])  # noqa: E731
    for group in grouped(batches(3 * k), k):
        optimizer.step([steppe.MeanBatch(other, loss, b) for b in group])
    close(model.net, other)
    seen = trainer.optimizer.optimizer.telemetry
    assert seen.passes == pytest.approx(optimizer.telemetry.passes)


# --------------------------------------------------------------------------------------------------- a language model


class Texts(torch.utils.data.Dataset):
    """Texts of several lengths, padded, some of whose labels are ignored; one has no label at all."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(1)
        self.rows = torch.randint(1, 32, (n, 12), generator=g)
        self.lengths = torch.randint(3, 13, (n,), generator=g)
        self.prompts = torch.randint(0, 3, (n,), generator=g)
        self.prompts[5] = 12

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(12) < self.lengths[i]).long()
        labels = torch.where(mask.bool() & (torch.arange(12) >= self.prompts[i]), self.rows[i], IGNORED)
        return {"input_ids": self.rows[i] * mask, "attention_mask": mask, "labels": labels}

    def batch(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = [self[i] for i in range(start, stop)]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def lm_arguments(path, k: int = 2, steps: int = 3, **more):
    constant = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": 6}
    return arguments(path, k, steps, **constant | more)


def tokens(data) -> torch.Tensor:
    return (data["labels"][:, 1:] != IGNORED).sum()


def mean(model, data) -> torch.Tensor:
    return model(**data).loss


def by_hand(make, k: int = 2, steps: int = 3, loss=mean) -> nn.Module:
    model, texts = llama(), Texts(6 * k * steps)
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(steps):
        starts = [6 * (k * step + i) for i in range(k)]
        optimizer.step([steppe.MeanBatch(model, loss, texts.batch(i, i + 6), weight=tokens) for i in starts])
    return model


@pytest.mark.parametrize(("name", "k"), [("sampled", 1), *((name, 2) for name in PARTS)])
def test_a_mean_over_tokens_weighs_parts_by_their_tokens(name: str, k: int, tmp_path) -> None:
    model = llama()
    trainer = Sequential(model, lm_arguments(tmp_path, k), train_dataset=Texts(18 * k), sharpness=PARTS[name])
    trainer.train()
    assert trainer.optimizer.optimizer.telemetry.skipped == 0
    close(model, by_hand(PARTS[name], k))


class Plain(InOrder, transformers.Trainer):
    pass


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_a_radius_of_zero_is_the_plain_trainer_bit_for_bit(more, tmp_path) -> None:
    """No part is asked for."""
    models = []
    for cls, own in ((Sequential, {"sharpness": lambda base: PARTS["WSAM"](base, 0.0)}), (Plain, {})):
        models.append(llama())
        trainer = cls(models[-1], lm_arguments(tmp_path, max_grad_norm=0.5, **more), train_dataset=Texts(36), **own)
        trainer.train()
    assert same(*models)


@pytest.mark.parametrize("name", ["m", "sampled"])
def test_label_smoothing_is_in_every_part(name: str, tmp_path) -> None:
    model = llama()
    args = lm_arguments(tmp_path, label_smoothing_factor=0.2)
    Sequential(model, args, train_dataset=Texts(36), sharpness=PARTS[name]).train()

    def smoothed(model, data):
        logits = model(**{k: v for k, v in data.items() if k != "labels"}).logits[:, :-1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), data["labels"][:, 1:].flatten(), label_smoothing=0.2, ignore_index=IGNORED
        )

    close(model, by_hand(PARTS[name], loss=smoothed))


def test_sampling_one_text_costs_little_more_than_the_plain_trainer(tmp_path) -> None:
    sharpness = lambda base: steppe.SAM(base, m=1, sampled=1)  # noqa: E731
    trainer = Sequential(llama(), lm_arguments(tmp_path), train_dataset=Texts(36), sharpness=sharpness)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["sharpness_passes"] for entry in logged] == pytest.approx([1 + 2 / 12] * 3)
    assert all(entry["sharpness_gap"] > 0 for entry in logged)


def test_it_resumes_bit_for_bit(tmp_path) -> None:
    def run(path, resume=None):
        args = lm_arguments(path, 2, 4, save_strategy="steps", save_steps=2)
        trainer = SharpnessAwareTrainer(llama(), args, train_dataset=Texts(36), sharpness=PARTS["sampled"])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    assert same(run(tmp_path / "a"), run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")))


# ----------------------------------------------------------------------------------------------------- single examples


@pytest.mark.parametrize("make", [steppe.RWSAM, partial(steppe.ESAM, beta=1.0)], ids=["RWSAM", "ESAM"])
def test_methods_of_single_examples_take_losses(make, tmp_path) -> None:
    model, other, texts = llama(), llama(), Texts(36)
    own = lambda base: make(base, rho=0.1)  # noqa: E731
    trainer = Sequential(model, lm_arguments(tmp_path), train_dataset=texts, sharpness=own, losses=causal_lm_losses)
    trainer.train()
    optimizer = own(torch.optim.SGD(other.parameters(), lr=0.1))
    for step in range(3):
        parts = [texts.batch(i, i + 6) for i in (12 * step, 12 * step + 6)]
        total = sum(float(tokens(part)) for part in parts)
        loss = lambda m, d, total=total: causal_lm_losses(m, d) * 12 / total  # noqa: E731
        optimizer.step([steppe.Batch(other, loss, part) for part in parts])
    close(model, other)


def test_losses_are_those_of_the_model() -> None:
    model, data = llama(), Texts(6).batch(0, 6)
    torch.testing.assert_close(causal_lm_losses(model, data).sum() / tokens(data), mean(model, data))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.net(x))

    x, y = batches(1)[0]
    classifier = Classifier().eval()
    losses = classification_losses(classifier, {"x": x, "labels": y})
    torch.testing.assert_close(losses.mean(), nn.functional.cross_entropy(classifier.net(x), y))


def test_single_losses_of_zero_radius_are_not_asked_for(tmp_path) -> None:
    models = []
    for cls, own in ((Sequential, {"sharpness": lambda base: steppe.RWSAM(base, 0.0)}), (Plain, {})):
        models.append(llama())
        cls(models[-1], lm_arguments(tmp_path), train_dataset=Texts(36), **own).train()
    assert same(*models)


def test_what_cannot_be_done_is_refused_with_what_to_write(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"pass losses=.*causal_lm_losses"):
        Sequential(llama(), lm_arguments(tmp_path), train_dataset=Texts(36), sharpness=steppe.RWSAM).train()

    def flattened(rows):
        one = {key: torch.cat([row[key] for row in rows])[None] for key in ("input_ids", "labels")}
        return one | {"position_ids": torch.cat([torch.arange(len(row["labels"])) for row in rows])[None]}

    trainer = Sequential(
        llama(), lm_arguments(tmp_path), train_dataset=Texts(36), sharpness=PARTS["m"], data_collator=flattened
    )
    with pytest.raises(NotImplementedError, match="padding-free inputs are one row"):
        trainer.train()


def test_a_loss_that_does_not_add_up_is_told(tmp_path) -> None:
    def contrastive(outputs, labels, num_items_in_batch=None):
        z = outputs.logits[:, -1]
        return nn.functional.cross_entropy(z @ z.T.roll(1, 0), torch.arange(len(z)))

    trainer = Sequential(
        llama(), lm_arguments(tmp_path, 1), train_dataset=Texts(18), sharpness=PARTS["m"], compute_loss_func=contrastive
    )
    with pytest.warns(UserWarning, match="not the weighted mean of its parts"):
        trainer.train()


def test_the_search_of_the_trainer_reaches_rho(tmp_path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seen = []
    args = lm_arguments(tmp_path, 1, 2)
    args.rho = 0.05

    def sharpness(base):
        seen.append(args.rho)
        return steppe.SAM(base, rho=args.rho)

    trainer = Sequential(
        None,
        args,
        train_dataset=Texts(12),
        eval_dataset=Texts(6),
        sharpness=sharpness,
        model_init=lambda *_: llama(),
    )
    best = trainer.hyperparameter_search(
        lambda trial: {"rho": trial.suggest_categorical("rho", [0.01, 0.1])},
        backend="optuna",
        n_trials=2,
        direction="minimize",
        sampler=optuna.samplers.GridSampler({"rho": [0.01, 0.1]}),
    )
    assert sorted(seen) == [0.01, 0.1]
    assert best.hyperparameters["rho"] in (0.01, 0.1)
    assert trainer.optimizer.optimizer.param_groups[0]["rho"] == seen[-1]
