"""Loops and frameworks that need no integration: each against a hand-written loop, and bit for bit at a radius of 0."""

import copy
import os

import pytest
import torch
from torch import nn

import steppe
from tests.integrations.helpers import Net, batches, digits, same

CE = nn.functional.cross_entropy


def sgd(model: nn.Module, **more) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **more)


def close(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def by_hand(model: nn.Module, base: torch.optim.Optimizer, loss, rho: float) -> float:
    """A step of SAM as in the paper, with nothing else."""
    base.zero_grad()
    state = torch.get_rng_state()
    value = loss()
    value.backward()
    if not rho:
        base.step()
        return float(value.detach())
    params = [p for p in model.parameters() if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    old = [p.detach().clone() for p in params]
    buffers = copy.deepcopy([b for _, b in model.named_buffers()])
    with torch.no_grad():
        for p in params:
            p += rho * p.grad / norm
    base.zero_grad()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    loss().backward()
    torch.set_rng_state(after)
    with torch.no_grad():
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
        for b, kept in zip(model.buffers(), buffers, strict=True):
            b.copy_(kept)
    base.step()
    return float(value.detach())


# ------------------------------------------------------------------------------------------------------- plain loops


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.8)) / 0.8


class Images(nn.Module):
    """A convolutional net with batch norm and stochastic depth, as timm's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm, self.drop = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), DropPath()
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.drop(self.conv(x).relu())).mean((2, 3)))


def adaptive_clip(parameters, factor: float = 0.1) -> None:
    """Clip every gradient to a share of its weight's norm, as timm's AGC does, tensor by tensor."""
    for p in parameters:
        if p.grad is not None:
            most = p.detach().norm().clamp_min(1e-3) * factor
            p.grad.mul_((most / p.grad.norm().clamp_min(1e-6)).clamp(max=1.0))


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_a_loop_like_timms(rho: float) -> None:
    """Mixup, soft labels, channels last, drop path, AGC between the passes and the step, an average of the weights."""
    x, y = digits(64)
    x = x.reshape(-1, 1, 8, 8).to(memory_format=torch.channels_last)
    mixed = 0.3 * x.flip(0) + 0.7 * x
    soft = 0.3 * nn.functional.one_hot(y.flip(0), 10) + 0.7 * nn.functional.one_hot(y, 10)
    model, other = (Images().to(memory_format=torch.channels_last) for _ in range(2))
    averages = [torch.optim.swa_utils.AveragedModel(m) for m in (model, other)]
    optimizer, base = steppe.SAM(sgd(model), rho), sgd(other)
    base.register_step_pre_hook(lambda *_: adaptive_clip(other.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = CE(model(mixed), soft)
        loss.backward()
        return loss

    for step in range(3):
        torch.manual_seed(step)
        loss = optimizer.backward(closure)
        adaptive_clip(model.parameters())
        optimizer.step()
        averages[0].update_parameters(model)
        torch.manual_seed(step)
        assert float(loss) == pytest.approx(by_hand(other, base, lambda: CE(other(mixed), soft), rho), rel=1e-6)
        averages[1].update_parameters(other)
    if rho == 0:
        assert same(model, other)
        assert same(*averages)
    close(model, other)
    close(*averages)


class LM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.rnn, self.head = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 20)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(20, (8, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i in range(8):
        labels[i, 4 + i :] = -100
    return ids, labels


def token_mean(model, data):
    ids, labels = data
    return CE(model(ids)[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)


def token_count(data):
    return (data[1][:, 1:] != -100).sum()


def test_a_causal_language_model_by_tokens_and_by_texts() -> None:
    """Sums over each text's tokens, times n / N, are losses of single texts whose mean is the mean over tokens."""
    data = texts()
    total = float(token_count(data))

    def by_text(model, d):
        losses = CE(model(d[0])[:, :-1].transpose(1, 2), d[1][:, 1:], ignore_index=-100, reduction="none")
        return losses.sum(1) * len(data[0]) / total

    for options in ({"rho": 0.0}, {"rho": 0.1}):
        models = LM(), LM(), LM()
        steppe.SAM(sgd(models[0]), **options).step(steppe.MeanBatch(models[0], token_mean, data, weight=token_count))
        steppe.SAM(sgd(models[1]), parallel=False, **options).step(steppe.Batch(models[1], by_text, data))
        base = sgd(models[2])
        by_hand(models[2], base, lambda m=models[2]: token_mean(m, data), options["rho"])
        assert options["rho"] or same(models[0], models[2])
        close(models[0], models[2])
        close(models[1], models[2])
    model = LM()
    optimizer = steppe.RWSAM(sgd(model), 0.1)
    optimizer.step(steppe.Batch(model, by_text, data))  # looks at single texts
    assert optimizer.telemetry.skipped == 0


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_two_optimizers_of_a_gan(rho: float) -> None:
    """The passes of one player leave the other's weights, gradients and statistics alone."""

    def players():
        torch.manual_seed(3)
        return (
            nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)),
            nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 1)),
        )

    bce = nn.functional.binary_cross_entropy_with_logits
    real = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    ours, theirs = players(), players()
    optimizers = [steppe.SAM(sgd(p), rho) for p in ours]
    bases = [sgd(p) for p in theirs]
    for step in range(3):
        noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))

        def judged(pair, noise=noise):
            g, d = pair
            return bce(d(real), torch.ones(16, 1)) + bce(d(g(noise).detach()), torch.zeros(16, 1))

        def fooled(pair, noise=noise):
            g, d = pair
            return bce(d(g(noise)), torch.ones(16, 1))

        for player, loss in ((1, judged), (0, fooled)):

            def closure(player=player, loss=loss):
                optimizers[player].zero_grad()
                value = loss(ours)
                value.backward()
                return value

            optimizers[player].step(closure)
            by_hand(theirs[player], bases[player], lambda loss=loss: loss(theirs), rho)
    for a, b in zip(ours, theirs, strict=True):
        if rho == 0:
            assert same(a, b)
        close(a, b)


# --------------------------------------------------------------------------------------------------------- frameworks


def test_skorch_searches_a_grid_of_rho() -> None:
    skorch = pytest.importorskip("skorch")
    from sklearn.model_selection import GridSearchCV

    def sam(params, rho=0.05, lr=0.1, **more):
        return steppe.SAM(torch.optim.SGD(params, lr=lr, **more), rho=rho)

    x, y = digits(128)

    def made(optimizer, **more):
        torch.manual_seed(0)
        return skorch.NeuralNetClassifier(
            Net, criterion=nn.CrossEntropyLoss, optimizer=optimizer, max_epochs=2, lr=0.1, verbose=0, **more
        )

    plain, ours = made(torch.optim.SGD), made(sam, optimizer__rho=0.0)
    for net in (plain, ours):
        torch.manual_seed(0)
        net.fit(x.numpy(), y.numpy())
    assert same(plain.module_, ours.module_)
    search = GridSearchCV(made(sam, train_split=None), {"optimizer__rho": [0.0, 0.1]}, cv=2, refit=True)
    search.fit(x.numpy(), y.numpy())
    assert search.best_estimator_.optimizer_.telemetry.steps > 0
    assert search.best_params_["optimizer__rho"] in (0.0, 0.1)
    again = made(sam, optimizer__rho=0.1).fit(x.numpy(), y.numpy())
    assert again.optimizer_.telemetry.passes == 2


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore")
def test_ignite_steps_in_its_process_function(rho: float) -> None:
    ignite = pytest.importorskip("ignite.engine")
    model, other, data = Net(), Net(), batches(4)
    optimizer, base = steppe.SAM(sgd(model), rho), sgd(other)
    losses, started = [], []

    def update(engine, batch):
        started.append(torch.get_rng_state())

        def closure():
            optimizer.zero_grad()
            loss = CE(model(batch[0]), batch[1])
            loss.backward()
            return loss

        return float(optimizer.step(closure))

    engine = ignite.Engine(update)
    engine.add_event_handler(ignite.Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output))
    engine.run(data)
    torch.set_rng_state(started[0])
    theirs = [by_hand(other, base, lambda x=x, y=y: CE(other(x), y), rho) for x, y in data]
    assert losses == pytest.approx(theirs, rel=1e-5)
    assert rho or same(model, other)
    close(model, other)


@pytest.mark.filterwarnings("ignore")
def test_keras_takes_the_step_in_its_train_step(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "torch":
        pytest.skip("Keras runs on another back end here")

    class Sharp(keras.Sequential):
        def train_step(self, data):
            x, y = data[:2]

            def closure():
                self.sharp.zero_grad()
                loss = self.compute_loss(x, y, self(x, training=True))
                loss.backward()
                return loss

            loss = self.sharp.step(closure)
            self._loss_tracker.update_state(loss)
            return self.compute_metrics(x, y, self(x, training=False))

    x, y = digits(64)
    weights = []
    for rho in (None, 0.0, 0.1):
        keras.utils.set_random_seed(0)
        cls = keras.Sequential if rho is None else Sharp
        model = cls([keras.layers.Dense(16, activation="relu"), keras.layers.Dense(10)])
        model.build((None, 64))
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        if rho is not None:
            model.sharp = steppe.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho)
        model.fit(x.numpy(), y.numpy(), batch_size=32, epochs=1, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for a, b, c in zip(*weights, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-7)
        assert not (b == c).all()
    assert model.sharp.telemetry.passes == 2


@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore")
def test_ray_tunes_rho() -> None:
    ray = pytest.importorskip("ray")
    tune = pytest.importorskip("ray.tune")
    x, y = digits(32)

    def trainable(config):
        model = Net()
        optimizer = steppe.SAM(sgd(model), rho=config["rho"])

        def closure():
            optimizer.zero_grad()
            loss = CE(model(x), y)
            loss.backward()
            return loss

        for _ in range(2):
            loss = optimizer.step(closure)
        tune.report({"loss": float(loss), "passes": optimizer.telemetry.passes})

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        found = tune.Tuner(trainable, param_space={"rho": tune.grid_search([0.0, 0.1])}).fit()
        assert {r.config["rho"]: r.metrics["passes"] for r in found} == {0.0: 1, 0.1: 2}
    finally:
        ray.shutdown()


@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore")
def test_ray_trains_two_workers_as_one_process(tmp_path) -> None:
    """``sync="global"`` on two workers is SAM of the whole batch; a radius of 0 is the plain loop bit for bit."""
    ray = pytest.importorskip("ray")
    ray_torch = pytest.importorskip("ray.train.torch")
    from ray import train

    def worker(config):  # it names no function of this module, which workers do not have
        rank, found = train.get_context().get_world_rank(), {}
        for rho in (None, 0.0, 0.1):
            torch.manual_seed(3)
            net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
            model = ray_torch.prepare_model(net)  # DDP
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if rho is not None:
                optimizer = steppe.SAM(optimizer, rho=rho, sync="global")
            for x, y in config["batches"]:

                def closure(model=model, optimizer=optimizer, x=x, y=y):
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(model(x.chunk(2)[rank]), y.chunk(2)[rank])
                    loss.backward()
                    return loss

                optimizer.step(closure)
            found[rho] = [p.detach() for p in net.parameters()]
        if rank == 0:
            torch.save(found, config["to"])
        train.report({"passes": optimizer.telemetry.passes})

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        ray_torch.TorchTrainer(
            worker,
            train_loop_config={"batches": batches(4), "to": str(tmp_path / "weights.pt")},
            scaling_config=train.ScalingConfig(num_workers=2, use_gpu=False),
            run_config=train.RunConfig(storage_path=str(tmp_path)),
        ).fit()
    finally:
        ray.shutdown()
    found = torch.load(tmp_path / "weights.pt")
    assert all(map(torch.equal, found[None], found[0.0]))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    base = sgd(model)
    for x, y in batches(4):
        by_hand(model, base, lambda x=x, y=y: CE(model(x), y), 0.1)
    for p, q in zip(model.parameters(), found[0.1], strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_fastai_runs_the_passes_in_a_callback(rho: float) -> None:
    """One cycle with clipping: bit for bit without a radius; with it the loop by hand, clipped before the step."""
    learner = pytest.importorskip("fastai.learner")
    from fastai.callback.core import Callback, CancelBackwardException
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.optimizer import OptimWrapper

    started = []

    class Sharpness(Callback):
        def before_batch(self):
            self.random = torch.get_rng_state()
            started.append(self.random)

        def before_backward(self):
            learn, first = self.learn, [self.learn.loss_grad]

            def closure():
                learn.opt.zero_grad()
                if first:
                    loss = first.pop()
                else:
                    torch.set_rng_state(self.random)  # the same dropout masks
                    loss = learn.loss_func(learn.model(*learn.xb), *learn.yb)
                loss.backward()
                return loss

            learn.opt.opt.backward(closure)
            raise CancelBackwardException

    rows = list(zip(*digits(128), strict=True))

    def fitted(make, *callbacks):
        model = Net()
        loaders = DataLoaders(DataLoader(rows, bs=32), DataLoader(rows, bs=32))
        learn = learner.Learner(
            loaders,
            model,
            nn.CrossEntropyLoss(),
            opt_func=lambda groups, lr=None, **_: OptimWrapper(groups, make),
            cbs=[GradientClip(0.5), *callbacks],
        )
        torch.manual_seed(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.1)
        return model, learn

    ours, learn = fitted(lambda groups: steppe.SAM(torch.optim.SGD(groups, lr=0.1), rho=rho), Sharpness())
    assert learn.opt.opt.telemetry.passes == (2 if rho else 1)
    if rho:
        other = Net()
        base = torch.optim.SGD(other.parameters(), lr=0.1)
        base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(other.parameters(), 0.5) and None)
        torch.set_rng_state(started[0])
        for x, y in batches(4, 32):
            by_hand(other, base, lambda x=x, y=y: CE(other(x), y), rho)
    else:
        other, _ = fitted(lambda groups: torch.optim.SGD(groups, lr=0.1))
        assert same(ours, other)
    close(ours, other)
