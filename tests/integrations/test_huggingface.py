"""The Trainer agrees with the plain loop bit for bit, and both passes really run."""

import pytest
import torch
from torch import nn

import steppe
from tests.integrations.helpers import METHODS, PASSES, Net, batches, digits, grouped, plain_loop, same
from tests.integrations.test_accelerate import float16

transformers = pytest.importorskip("transformers")

from accelerate.utils import DistributedType  # noqa: E402

from steppe.integrations.huggingface import SharpnessAwareTrainer, SharpnessAwareTrainerMixin  # noqa: E402


class Digits(torch.utils.data.Dataset):
    def __init__(self, n: int) -> None:
        self.x, self.y = digits(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


class Model(nn.Module):
    """As the Trainer wants it: keyword arguments in, a dictionary with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.config = transformers.PretrainedConfig()
        self.random = []  # the state of the generator before the first pass

    def forward(self, x, labels=None):
        if not self.random:
            self.random.append(torch.get_rng_state())
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


class InOrder:
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Sequential(InOrder, SharpnessAwareTrainer):
    pass


def arguments(path, k: int = 1, steps: int = 4, **more):
    defaults = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": k,
        "max_steps": steps,
        "learning_rate": 0.1,
        "lr_scheduler_type": "linear",
        "optim": "sgd",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(str(path), **defaults | more)


def plain(model: Model, trainer, make, groups, **options):
    """The plain loop from the Trainer's random state, with its groups and its schedule."""
    other = Net()
    decays = trainer.get_decay_parameter_names(trainer.model)
    named = [(f"net.{name}", p) for name, p in other.named_parameters()]
    base = torch.optim.SGD(
        [{"params": [p for n, p in named if n in decays]}, {"params": [p for n, p in named if n not in decays]}],
        lr=0.1,
    )
    optimizer = make(base)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, trainer.args.max_steps)
    torch.set_rng_state(model.random[0])
    losses = plain_loop(other, optimizer, groups, scheduler=scheduler, **options)
    return other, losses


@pytest.mark.parametrize(("name", "k"), [("SAM", 1), *((name, 3) for name in METHODS)])
def test_it_is_the_plain_loop(name: str, k: int, tmp_path) -> None:
    model = Model()
    trainer = Sequential(model, arguments(tmp_path, k), train_dataset=Digits(64 * k), sharpness=METHODS[name])
    trainer.train()
    other, losses = plain(model, trainer, METHODS[name], grouped(batches(4 * k), k), clip=0.5)
    assert same(model.net, other)
    assert model.net.forwards == other.forwards == PASSES[name] * 4 * k
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, abs=1e-6)


def test_what_is_logged_is_what_the_optimizer_saw(tmp_path) -> None:
    trainer = Sequential(Model(), arguments(tmp_path, 2), train_dataset=Digits(128), sharpness=METHODS["SAM"])
    trainer.train()
    *logged, final = trainer.state.log_history
    assert len(logged) == 4
    for entry in logged:
        assert entry["sharpness_rho"] == 0.1
        assert entry["sharpness_eps_norm"] == pytest.approx(0.1, rel=1e-5)
        assert entry["sharpness_passes"] == 2
        assert entry["sharpness_gap"] > 0
        assert entry["grad_norm"] == pytest.approx(entry["sharpness_g_adv_norm"], rel=1e-5)  # before it is clipped
    assert "sharpness_gap" not in final


@pytest.mark.parametrize("name", ["FSAM", "WSAM"])
def test_a_checkpoint_resumes_bit_for_bit(name: str, tmp_path) -> None:
    def trainer(path, steps=6):
        args = arguments(path, 2, steps, save_strategy="steps", save_steps=3, optim="adamw_torch", learning_rate=1e-2)
        data = Digits(32 * 4)  # an epoch is 4 steps, in random order
        return SharpnessAwareTrainer(Model(), args, train_dataset=data, sharpness=METHODS[name])

    whole = trainer(tmp_path / "whole")
    whole.train()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same(whole.model, again.model)
    mine, theirs = (t.optimizer.optimizer.state_dict() for t in (whole, again))
    assert mine["param_groups"] == theirs["param_groups"]
    for p, kept in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][p][key]) for key, value in kept.items())
    assert again.optimizer.optimizer.telemetry.steps == 6


def test_bfloat16(tmp_path) -> None:
    model = Model()
    args = arguments(tmp_path, 2, bf16=True)
    trainer = Sequential(model, args, train_dataset=Digits(128), sharpness=METHODS["SAM"])
    trainer.train()
    other, _ = plain(model, trainer, METHODS["SAM"], grouped(batches(8), 2), clip=0.5, autocast=torch.bfloat16)
    assert same(model.net, other)


@pytest.mark.parametrize("init_scale", [2.0**8, 2.0**20], ids=["fits", "overflows"])
def test_float16(init_scale: float, tmp_path) -> None:
    """The Trainer refuses float16 on a CPU, where torch has both autocast and scaler: what it sets on a GPU."""
    model = Model()
    args = arguments(tmp_path, 2, steps=8)
    trainer = Sequential(model, args, train_dataset=Digits(256), sharpness=METHODS["SAM"])
    float16(trainer.accelerator, init_scale)
    trainer.train()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    groups = grouped(batches(16), 2)
    other, _ = plain(model, trainer, METHODS["SAM"], groups, clip=0.5, autocast=torch.float16, scaler=scaler)
    assert same(model.net, other)
    assert trainer.accelerator.scaler.state_dict() == scaler.state_dict()
    assert (trainer.optimizer.optimizer.telemetry.skipped > 0) == (init_scale == 2.0**20)


def test_a_loss_of_ones_own_is_used_in_every_pass(tmp_path) -> None:
    calls = []

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        calls.append(int(num_items_in_batch))
        summed = nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.2, reduction="sum")
        return summed / num_items_in_batch

    model = Model()
    trainer = Sequential(
        model,
        arguments(tmp_path, 2),
        train_dataset=Digits(128),
        sharpness=METHODS["SAM"],
        compute_loss_func=compute_loss_func,
    )
    trainer.train()
    assert calls == [32] * 16

    def criterion(out, y):
        return nn.functional.cross_entropy(out, y, label_smoothing=0.2)

    other, _ = plain(model, trainer, METHODS["SAM"], grouped(batches(8), 2), clip=0.5, criterion=criterion)
    for p, q in zip(model.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_label_smoothing_is_in_every_pass(tmp_path) -> None:
    model = Model()
    args = arguments(tmp_path, label_smoothing_factor=0.3)
    trainer = Sequential(model, args, train_dataset=Digits(64), sharpness=METHODS["USAM"])
    trainer.train()

    def criterion(out, y):  # the Trainer's: (1 - s) nll + s times the mean over classes
        return nn.functional.cross_entropy(out, y, label_smoothing=0.3)

    other, _ = plain(model, trainer, METHODS["USAM"], grouped(batches(4), 1), clip=0.5, criterion=criterion)
    for p, q in zip(model.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_the_last_update_of_an_epoch_may_have_fewer_micro_batches(tmp_path) -> None:
    model = Model()
    args = arguments(tmp_path, 3, steps=2)
    trainer = Sequential(model, args, train_dataset=Digits(80), sharpness=METHODS["SAM"])  # 3 + 2
    trainer.train()
    other, _ = plain(model, trainer, METHODS["SAM"], grouped(batches(5), 3), clip=0.5)
    assert same(model.net, other)


def test_callbacks_see_the_gradient_that_the_base_sees(tmp_path) -> None:
    norms, weights = [], []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            weights.append([p.detach().clone() for p in model.parameters()])

        def on_step_begin(self, args, state, control, model=None, **_):
            weights.append([p.detach().clone() for p in model.parameters()])

    args = arguments(tmp_path, steps=3, max_grad_norm=1e-3)
    Sequential(Model(), args, train_dataset=Digits(48), sharpness=METHODS["SAM"], callbacks=[Look()]).train()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)
    for begin, before_step in zip(weights[::2], weights[1::2], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(begin, before_step, strict=True))  # at w, not at w + eps


def test_optimizers_may_be_given_and_training_may_go_on(tmp_path) -> None:
    model = Model()
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1)
    trainer = Sequential(model, arguments(tmp_path), train_dataset=Digits(64), optimizers=(optimizer, None))
    trainer.train()
    trainer.train()
    assert model.net.forwards == 16
    assert optimizer.telemetry.steps == 8


class Custom(InOrder, transformers.Trainer):
    """A Trainer of one's own, whose training_step is kept."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        return super().training_step(*args, **kwargs)


class SharpCustom(SharpnessAwareTrainerMixin, Custom):
    pass


def test_a_trainer_of_ones_own(tmp_path) -> None:
    trainer = SharpCustom(Model(), arguments(tmp_path, 2), train_dataset=Digits(128), sharpness=METHODS["SAM"])
    trainer.train()
    assert trainer.seen == 16


def test_without_it_no_second_pass_runs_and_that_is_said(tmp_path) -> None:
    model = Model()
    optimizer = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        Custom(model, arguments(tmp_path), train_dataset=Digits(64), optimizers=(optimizer, None)).train()
    assert model.net.forwards == 4
    with pytest.raises(TypeError, match="SharpnessAwareTrainerMixin must come before Trainer"):
        type("Late", (transformers.Trainer, SharpnessAwareTrainerMixin), {})


def test_what_cannot_be_done_is_refused_with_what_to_write(tmp_path, monkeypatch) -> None:
    with pytest.raises(TypeError, match=r"pass sharpness=lambda base: steppe\.SAM"):
        Sequential(Model(), arguments(tmp_path), train_dataset=Digits(64)).train()
    trainer = Sequential(Model(), arguments(tmp_path), train_dataset=Digits(64), sharpness=METHODS["SAM"])
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(NotImplementedError, match=r"MEGATRON_LM.*optimizer\.step\(closure\)"):
        trainer.training_step(trainer.model, {})
