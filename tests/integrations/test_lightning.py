"""Lightning agrees with the plain loop bit for bit, and both passes really run."""

import pytest
import torch
from torch import nn

import steppe
from tests.integrations.helpers import METHODS, PASSES, Net, batches, grouped, plain_loop, same, sgd

L = pytest.importorskip("lightning")

import torchmetrics  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from steppe.integrations.lightning import SharpnessAwareMixin  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec.*", "ignore:.*dataloader_iter"
)


class Module(SharpnessAwareMixin, L.LightningModule):
    def __init__(self, make=METHODS["SAM"]) -> None:
        super().__init__()
        self.net, self.make = Net(), make
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
        self.random = []  # the state of the generator before the first pass
        self.norms = []

    def loss(self, batch):
        x, y = batch
        if not self.random:
            self.random.append(torch.get_rng_state())
        out = self.net(x)
        self.accuracy(out, y)
        return nn.functional.cross_entropy(out.float(), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def configure_optimizers(self):
        return self.make(sgd(self))


class Manual(Module):
    def __init__(self, make=METHODS["SAM"]) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            self.optimizers().zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.log("in_closure", loss, on_step=False, on_epoch=True, batch_size=1)
            return loss

        self.log("loss", self.sharpness_step(closure), on_step=False, on_epoch=True, batch_size=1)


def trainer(path, **more):
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=path, **defaults | more)


def loader(data):
    return torch.utils.data.DataLoader(data, batch_size=None)


def plain(module, make, groups, **options):
    other = Net()
    torch.set_rng_state(module.random[0])
    return other, plain_loop(other, make(sgd(other)), groups, **options)


@pytest.mark.parametrize(("name", "k"), [("SAM", 1), *((name, 3) for name in METHODS)])
def test_it_is_the_plain_loop(name: str, k: int, tmp_path) -> None:
    data, module = batches(4 * k), Module(METHODS[name])
    fit = trainer(tmp_path, accumulate_grad_batches=k, gradient_clip_val=0.5)
    fit.fit(module, loader(data))
    other, losses = plain(module, METHODS[name], grouped(data, k), clip=0.5)
    assert same(module.net, other)
    assert module.net.forwards == other.forwards == PASSES[name] * 4 * k
    assert fit.global_step == 4
    assert fit.callback_metrics["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)  # of the first passes alone
    assert float(module.optimizers().telemetry.loss) == pytest.approx(losses[-1], rel=1e-6)


def test_bfloat16(tmp_path) -> None:
    data, module = batches(6), Module()
    fit = trainer(tmp_path, accumulate_grad_batches=2, precision="bf16-mixed", gradient_clip_val=0.5)
    fit.fit(module, loader(data))
    other, _ = plain(module, METHODS["SAM"], grouped(data, 2), autocast=torch.bfloat16, clip=0.5)
    assert same(module.net, other)


@pytest.mark.parametrize("init_scale", [2.0**8, 2.0**20], ids=["fits", "overflows"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_float16(manual: bool, init_scale: float, tmp_path) -> None:
    """Lightning turns "16-mixed" into bfloat16 on a CPU, so the plugin is given."""
    k, make = 1 if manual else 2, METHODS["USAM"]
    data, module, other = batches(8 * k), (Manual if manual else Module)(make), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    clip = None if manual else 0.5
    trainer(tmp_path, accumulate_grad_batches=k, plugins=[plugin], gradient_clip_val=clip).fit(module, loader(data))
    torch.set_rng_state(module.random[0])
    same_scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    reference = make(sgd(other))
    plain_loop(other, reference, grouped(data, k), clip=clip, autocast=torch.float16, scaler=same_scaler)
    assert same(module.net, other)
    assert scaler.state_dict() == same_scaler.state_dict()
    telemetry = module.optimizers().telemetry
    assert (telemetry.steps, telemetry.skipped) == (reference.telemetry.steps, reference.telemetry.skipped)
    assert (telemetry.skipped > 0) == (init_scale == 2.0**20)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimisation(precision: str, tmp_path) -> None:
    data, module = batches(4), Manual()
    fit = trainer(tmp_path, precision=precision)
    fit.fit(module, loader(data))
    other, losses = plain(
        module, METHODS["SAM"], grouped(data, 1), autocast=torch.bfloat16 if "bf16" in precision else None
    )
    assert same(module.net, other)
    assert module.net.forwards == 8
    assert fit.global_step == 4
    assert fit.callback_metrics["loss"] == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert fit.callback_metrics["in_closure"] == fit.callback_metrics["loss"]
    assert len(module.norms) == 4


def test_step_without_a_closure_in_manual_optimisation(tmp_path) -> None:
    """Lightning gives it a closure that does nothing: it moves after ``backward``, and alone it is the base's, told."""

    class Passes(Manual):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            if batch_idx < 2:
                optimizer.optimizer.backward(closure)
            else:
                closure()
            optimizer.step()

    data, module, other = batches(3), Passes(METHODS["SAM"]), Net()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="step\\(\\) was called without a closure"):
        trainer(tmp_path).fit(module, loader(data))
    torch.set_rng_state(module.random[0])
    optimizer = METHODS["SAM"](sgd(other))
    plain_loop(other, optimizer, grouped(data[:2], 1))
    optimizer.zero_grad()
    nn.functional.cross_entropy(other(data[2][0]), data[2][1]).backward()
    optimizer.base.step()
    assert same(module.net, other)


def test_manual_optimisation_with_a_method_that_looks_inside_the_batch(tmp_path) -> None:
    class Inside(Manual):
        def training_step(self, batch, batch_idx):
            self.sharpness_step(steppe.Batch.supervised(self.net, nn.CrossEntropyLoss(reduction="none"), *batch))

    make = lambda base: steppe.SAM(base, rho=0.1, m=4, parallel=False)  # noqa: E731
    data, module, other = batches(3), Inside(make), Net()
    state = torch.get_rng_state()
    trainer(tmp_path).fit(module, loader(data))
    torch.set_rng_state(state)
    optimizer = make(sgd(other))
    for x, y in data:
        optimizer.step(steppe.Batch.supervised(other, nn.CrossEntropyLoss(reduction="none"), x, y))
    assert module.net.forwards == other.forwards == 3 * 2 * 4


def test_further_passes_leave_no_trace(tmp_path) -> None:
    """Metrics count every example once, hooks see the combined gradient once, at w and before it is clipped."""
    data, module = batches(4), Module()
    seen = []
    module.on_train_epoch_end = lambda: seen.append(
        (module.accuracy.update_count, int(sum(module.accuracy.tp + module.accuracy.fn)), module.accuracy.compute())
    )
    trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, loader(data))
    assert seen[0][:2] == (4, 64)
    assert len(module.norms) == 2
    assert module.norms[-1] == pytest.approx(float(module.optimizers().telemetry.g_adv_norm), rel=1e-6)
    assert int(module.net.layers[1].num_batches_tracked) == 4
    assert not module.further_pass


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path) -> None:
    """Lightning divides by accumulate_grad_batches all the same."""
    data, module = batches(5), Module()
    trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2).fit(module, loader(data))
    assert module.net.forwards == 2 * 2 * 5
    assert module.optimizers().telemetry.steps == 4


def test_a_method_without_a_pass_at_w_runs_in_manual_optimisation_alone(tmp_path) -> None:
    """n-SAM's perturbation comes from other data, so the batch's only pass is at w + eps."""
    x, y = (torch.cat(part) for part in zip(*batches(2), strict=True))

    random = []  # the state of the generator before each pass over the other data

    def full(net):
        random.append(torch.get_rng_state())
        loss = nn.functional.cross_entropy(net(x), y)
        net.zero_grad()
        loss.backward()
        return loss

    data, module, other = batches(4), Manual(), Net()
    module.make = lambda base: steppe.NSAM(base, 0.1, full=lambda: full(module.net))
    trainer(tmp_path).fit(module, loader(data))
    torch.set_rng_state(random[0])
    plain_loop(other, steppe.NSAM(sgd(other), 0.1, full=lambda: full(other)), grouped(data, 1))
    assert same(module.net, other)
    module.__class__ = Module
    module.automatic_optimization = True
    with pytest.raises(NotImplementedError, match=r"use manual optimisation, self\.sharpness_step\(closure\)"):
        trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader(data))


class Shuffled(Module):
    def train_dataloader(self):
        x, y = (torch.cat(part) for part in zip(*batches(4), strict=True))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)

    def configure_optimizers(self):
        optimizer = self.make(torch.optim.AdamW(self.parameters(), lr=1e-2))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}


@pytest.mark.parametrize("name", ["FSAM", "WSAM"])
def test_a_checkpoint_resumes_bit_for_bit(name: str, tmp_path) -> None:
    def run(epochs, checkpoint=None):
        torch.manual_seed(0)
        module = Shuffled(METHODS[name])
        module.net.layers[3].p = 0.0  # Lightning's checkpoints do not hold the random state
        fit = trainer(tmp_path, max_epochs=epochs, accumulate_grad_batches=2)
        fit.fit(module, ckpt_path=checkpoint, weights_only=None if checkpoint is None else False)
        return fit, module

    first, _ = run(1)
    first.save_checkpoint(tmp_path / "first.ckpt")
    _, whole = run(3)
    _, again = run(3, tmp_path / "first.ckpt")
    assert same(whole, again)
    mine, theirs = (m.optimizers().optimizer.state_dict() for m in (whole, again))
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["param_groups"][0]["lr"] == 1e-2 * 0.5**3
    for p, kept in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][p][key]) for key, value in kept.items())


def test_a_skipped_step_moves_nothing_and_training_goes_on(tmp_path) -> None:
    class Bad(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    data, module = batches(3), Bad()
    with pytest.warns(UserWarning, match="not finite"):
        trainer(tmp_path, gradient_clip_val=0.5).fit(module, loader(data))
    assert module.optimizers().telemetry.skipped == 1
    assert module.optimizers().telemetry.steps == 2
    assert all(p.isfinite().all() for p in module.parameters())


def test_other_optimizers_are_left_alone(tmp_path) -> None:
    data, module, other = batches(3), Module(lambda base: base), Net()
    trainer(tmp_path).fit(module, loader(data))
    torch.set_rng_state(module.random[0])
    optimizer = sgd(other)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(x), y).backward()
        optimizer.step()
    assert same(module.net, other)


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match="SharpnessAwareMixin must come before LightningModule"):
        type("Late", (L.LightningModule, SharpnessAwareMixin), {})


def test_without_the_mixin_float16_is_refused_with_what_to_write(tmp_path) -> None:
    class Without(L.LightningModule):
        training_step, loss = Module.training_step, Module.loss

        def __init__(self):
            super().__init__()
            self.net, self.random, self.accuracy = Net(), [], torchmetrics.classification.MulticlassAccuracy(10)

        def configure_optimizers(self):
            return METHODS["SAM"](sgd(self))

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer\) knows one pass"):
        trainer(tmp_path, plugins=[plugin]).fit(Without(), loader(batches(1)))


def test_what_cannot_be_done_is_refused_with_what_to_write(tmp_path, monkeypatch) -> None:
    class Iterates(Module):
        def training_step(self, dataloader_iter):
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(NotImplementedError, match=r"take \(batch, batch_idx\)"):
        trainer(tmp_path).fit(Iterates(), loader(batches(1)))

    class NotOurs(Manual):
        def training_step(self, batch, batch_idx):
            self.sharpness_step(lambda: None, self.optimizers())

    with pytest.raises(TypeError, match=r"self\.optimizers\(\) that is steppe's"):
        trainer(tmp_path).fit(NotOurs(lambda base: base), loader(batches(1)))

    module = Module()
    monkeypatch.setattr("steppe.integrations.lightning.SingleDeviceStrategy", int)
    with pytest.raises(NotImplementedError, match='choose strategy="auto" or "ddp"'):
        trainer(tmp_path).fit(module, loader(batches(1)))


PARTS = {
    "sampled": lambda base, rho=0.1: steppe.SAM(base, rho=rho, m=4, sampled=2),
    "USAM": lambda base, rho=0.1: steppe.USAM(base, rho=rho, m=8, sampled=1),
    "ascent": lambda base, rho=0.1: steppe.SAM(base, rho=rho, ascent=4),
}


@pytest.mark.parametrize(("name", "k"), [("sampled", 1), ("ascent", 1), *((name, 3) for name in PARTS)])
def test_parts_of_the_batch_are_those_of_a_mean_batch(name: str, k: int, tmp_path) -> None:
    data, module, other = batches(3 * k), Module(PARTS[name]), Net()
    fit = trainer(tmp_path, accumulate_grad_batches=k)
    if name == "ascent" and k > 1:
        with pytest.raises(NotImplementedError, match="earlier micro-batches of accumulate_grad_batches at w"):
            fit.fit(module, loader(data))
        return
    fit.fit(module, loader(data))
    optimizer = PARTS[name](sgd(other))
    torch.set_rng_state(module.random[0])
    loss = lambda m, d: nn.functional.cross_entropy(m(d[0]), d[1])  # noqa: E731
    for group in grouped(data, k):
        optimizer.step([steppe.MeanBatch(other, loss, b) for b in group])
    for p, q in zip(module.net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert module.optimizers().telemetry.passes == pytest.approx(optimizer.telemetry.passes)
    assert fit.callback_metrics["sharpness_passes"] == pytest.approx(optimizer.telemetry.passes)
    assert int(sum(module.accuracy.tp + module.accuracy.fn)) in (0, 48 * k)


def test_a_radius_of_zero_is_lightning_bit_for_bit(tmp_path) -> None:
    """No part is asked for."""
    data, ours, theirs = batches(6), Module(lambda base: PARTS["sampled"](base, 0.0)), Module(lambda base: base)
    for module in (ours, theirs):
        torch.manual_seed(0)
        trainer(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.5).fit(module, loader(data))
    assert same(ours.net, theirs.net)


def test_the_telemetry_is_logged(tmp_path) -> None:
    module, fit = Module(), trainer(tmp_path)
    fit.fit(module, loader(batches(2)))
    seen = module.optimizers().telemetry
    for name in ("gap", "g_norm", "eps_norm", "passes"):
        assert float(fit.callback_metrics[f"sharpness_{name}"]) == pytest.approx(float(getattr(seen, name)))
    quiet, fit = Module(), trainer(tmp_path)
    quiet.log_sharpness = False
    fit.fit(quiet, loader(batches(2)))
    assert not any("sharpness" in name for name in fit.callback_metrics)


class Tuned(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 4

    def train_dataloader(self):
        x, y = (torch.cat(part) for part in zip(*batches(4), strict=True))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), self.batch_size)

    def configure_optimizers(self):
        return self.make(torch.optim.SGD(self.parameters(), lr=self.lr))


def test_the_tuner_runs_both_passes(tmp_path) -> None:
    module, fit = Tuned(), trainer(tmp_path)
    found = L.pytorch.tuner.Tuner(fit).lr_find(module, num_training=5, update_attr=False)
    assert len(found.results["loss"]) == 5
    assert module.net.forwards == 2 * 5
    L.pytorch.tuner.Tuner(trainer(tmp_path)).scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=4)
    assert module.batch_size == 8
    fit = trainer(tmp_path)
    fit.fit(module)
    assert module.optimizers().telemetry.passes == 2
    assert fit.global_step == 8


def test_hooks_of_the_user_need_not_call_super(tmp_path) -> None:
    calls = []

    class Own(Module):
        def on_train_batch_start(self, batch, batch_idx):
            calls.append("start")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            calls.append("end")

    class Calls(Own):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)

    for cls in (Own, Calls):
        data, module = batches(4), cls()
        trainer(tmp_path, accumulate_grad_batches=2).fit(module, loader(data))
        other, _ = plain(module, METHODS["SAM"], grouped(data, 2))
        assert same(module.net, other)
    assert calls == ["start", "end"] * 8


def test_two_optimizers(tmp_path) -> None:
    """Manual optimisation of two parts of a model, as of a generator and a discriminator."""

    class Two(Manual):
        def __init__(self) -> None:
            super().__init__()
            self.other = Net()

        def on_before_optimizer_step(self, optimizer):
            pass

        def configure_optimizers(self):
            return [METHODS["SAM"](sgd(self.net)), METHODS["USAM"](sgd(self.other))]

        def training_step(self, batch, batch_idx):
            for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):

                def closure(net=net, optimizer=optimizer):
                    self.random = self.random or [torch.get_rng_state()]
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
                    self.manual_backward(loss)
                    return loss

                self.sharpness_step(closure, optimizer)

    module, fit, data = Two(), trainer(tmp_path), batches(3)
    fit.fit(module, loader(data))
    first, second = Net(), Net()
    optimizers = METHODS["SAM"](sgd(first)), METHODS["USAM"](sgd(second))
    torch.set_rng_state(module.random[0])
    for batch in data:
        for net, optimizer in zip((first, second), optimizers, strict=True):
            plain_loop(net, optimizer, [[batch]])
    assert same(module.net, first)
    assert same(module.other, second)
    assert {"sharpness_gap_0", "sharpness_gap_1"} <= fit.callback_metrics.keys()


def test_methods_without_a_pass_at_w_say_what_to_write(tmp_path) -> None:
    for make, message in (
        (lambda base: steppe.SAM(base, m=4), r"sharpness_step\(closure\).*; or sampled="),
        (steppe.RWSAM, r"the closure may be a steppe\.Batch"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            trainer(tmp_path).fit(Module(make), loader(batches(1)))

    class Nothing(Module):
        def training_step(self, batch, batch_idx):
            return None

    with (
        pytest.warns(UserWarning, match="returned `None`"),
        pytest.raises(TypeError, match="training_step must return a loss"),
    ):
        trainer(tmp_path).fit(Nothing(), loader(batches(1)))


def test_a_step_without_any_gradient(tmp_path) -> None:
    class Sometimes(Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(64, 10)

        def on_before_optimizer_step(self, optimizer):
            pass

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy((self.net if batch_idx else self.other)(batch[0]), batch[1])

        def configure_optimizers(self):
            return self.make(sgd(self.net))

    module = Sometimes()
    with pytest.warns(UserWarning, match="no parameter received a gradient"):
        trainer(tmp_path).fit(module, loader(batches(3)))
    assert module.optimizers().telemetry.steps == 3
