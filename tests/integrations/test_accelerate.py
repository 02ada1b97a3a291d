"""accelerate agrees with the plain loop bit for bit, and both passes really run."""

import pytest
import torch
from torch import nn

import steppe
from tests.integrations.helpers import METHODS, PASSES, Net, batches, grouped, plain_loop, reset_accelerate, same, sgd

accelerate = pytest.importorskip("accelerate")

from accelerate.utils import DistributedType  # noqa: E402

from steppe.integrations.accelerate import Backward  # noqa: E402


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def prepared(make, k=1, precision="no", model=None):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=k, mixed_precision=precision)
    model = Net() if model is None else model
    wrapped, optimizer = accelerator.prepare(model, make(sgd(model)))
    return accelerator, wrapped, optimizer, Backward(accelerator, wrapped, optimizer, loss)


def train(parts, data, clip=None, scheduler=None):
    """accelerate's own loop, with ``backward(batch)`` where the three lines were."""
    accelerator, model, optimizer, backward = parts
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            losses.append(backward(batch))
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return [float(value) for value in losses if value is not None]


@pytest.mark.parametrize(("name", "k"), [("SAM", 1), *((name, 3) for name in METHODS)])
def test_it_is_the_plain_loop(name: str, k: int) -> None:
    data = batches(4 * k)
    parts = prepared(METHODS[name], k)
    model = parts[0].unwrap_model(parts[1])
    torch.manual_seed(0)
    losses = train(parts, data, clip=0.5)
    other = Net()
    torch.manual_seed(0)
    assert losses == plain_loop(other, METHODS[name](sgd(other)), grouped(data, k), clip=0.5)
    assert same(model, other)
    assert model.forwards == other.forwards == PASSES[name] * 4 * k


def test_bfloat16() -> None:
    data = batches(6)
    parts = prepared(METHODS["SAM"], 2, "bf16")
    torch.manual_seed(0)
    losses = train(parts, data)
    other = Net()
    torch.manual_seed(0)
    assert losses == plain_loop(other, METHODS["SAM"](sgd(other)), grouped(data, 2), autocast=torch.bfloat16)
    assert same(parts[0].unwrap_model(parts[1]), other)


def float16(accelerator, init_scale):
    """accelerate refuses float16 on a CPU, where torch has both autocast and scaler: what it sets on a GPU."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return accelerator


@pytest.mark.parametrize("init_scale", [2.0**8, 2.0**20], ids=["fits", "overflows"])
def test_float16(init_scale: float) -> None:
    data, make = batches(16), METHODS["USAM"]
    accelerator = float16(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), init_scale)
    model, other = Net(), Net()
    wrapped, optimizer = accelerator.prepare(model, make(sgd(model)))
    torch.manual_seed(0)
    train((accelerator, wrapped, optimizer, Backward(accelerator, wrapped, optimizer, loss)), data, clip=0.5)
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    reference = make(sgd(other))
    plain_loop(other, reference, grouped(data, 2), clip=0.5, autocast=torch.float16, scaler=scaler)
    assert same(model, other)
    assert accelerator.scaler.state_dict() == scaler.state_dict()
    telemetry = optimizer.optimizer.telemetry
    assert (telemetry.steps, telemetry.skipped) == (reference.telemetry.steps, reference.telemetry.skipped)
    assert (telemetry.skipped > 0) == (init_scale == 2.0**20)


def test_step_with_a_closure_needs_no_backward() -> None:
    accelerator, model, optimizer, _ = prepared(METHODS["SAM"])
    data = batches(3)
    torch.manual_seed(0)
    for x, y in data:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(value)
            return value

        optimizer.step(closure)
    other = Net()
    torch.manual_seed(0)
    plain_loop(other, METHODS["SAM"](sgd(other)), grouped(data, 1))
    assert same(accelerator.unwrap_model(model), other)


@pytest.mark.parametrize(
    "make",
    [
        lambda base: steppe.SAM(base, rho=0.1, m=4, sampled=2),
        lambda base: steppe.RWSAM(base, rho=0.1),
        lambda base: steppe.ESAM(base, rho=0.1),
    ],
    ids=["parts", "RWSAM", "ESAM"],
)
def test_the_prepared_step_takes_a_batch(make) -> None:
    """accelerate's wrapper drops what ``step`` returns; the telemetry has the loss."""
    _, model, optimizer, _ = prepared(make)
    other = Net()
    reference = make(sgd(other))
    criterion = nn.CrossEntropyLoss(reduction="none")
    for x, y in batches(3):
        torch.manual_seed(0)
        assert optimizer.step(steppe.Batch.supervised(model, criterion, x, y)) is None
        torch.manual_seed(0)
        loss = reference.step(steppe.Batch.supervised(other, criterion, x, y))
        assert torch.equal(optimizer.optimizer.telemetry.loss, loss)
    assert same(model, other)


def test_saved_state_resumes_bit_for_bit(tmp_path) -> None:
    data = batches(8)
    whole = prepared(METHODS["FSAM"], 2)
    torch.manual_seed(0)
    train(whole, data[:4])
    whole[0].save_state(tmp_path)
    train(whole, data[4:])
    reset_accelerate()
    again = prepared(METHODS["FSAM"], 2)
    again[0].load_state(tmp_path)
    train(again, data[4:])
    assert same(whole[0].unwrap_model(whole[1]), again[0].unwrap_model(again[1]))


def test_what_cannot_be_done_is_refused_with_what_to_write(monkeypatch) -> None:
    accelerator, model, optimizer, _ = prepared(METHODS["SAM"])
    with pytest.raises(TypeError, match=r"accelerator\.prepare\(steppe\.SAM\(base\)\)"):
        Backward(accelerator, model, optimizer.optimizer, loss)
    with pytest.raises(TypeError, match="steppe optimizer"):
        Backward(accelerator, model, accelerator.prepare(sgd(model)), loss)
    monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(NotImplementedError, match=r"DEEPSPEED.*optimizer\.step\(closure\)"):
        Backward(accelerator, model, optimizer, loss)


def test_without_it_no_second_pass_runs_and_that_is_said() -> None:
    accelerator, model, optimizer, _ = prepared(METHODS["SAM"])
    accelerator.backward(loss(model, batches(1)[0]))
    with pytest.warns(UserWarning, match="not sharpness-aware"):
        optimizer.step()


PARTS = {
    "m": lambda base, rho=0.1: steppe.SAM(base, rho=rho, m=4),
    "sampled": lambda base, rho=0.1: steppe.SAM(base, rho=rho, m=4, sampled=1),
    "ascent": lambda base, rho=0.1: steppe.SAM(base, rho=rho, ascent=4),
    "WSAM": lambda base, rho=0.1: steppe.WSAM(base, rho=rho, m=4, sampled=2),
}


def accumulated(model, group):
    """The update as ``steppe.MeanBatch``es of equal weight."""
    return [steppe.MeanBatch(model, lambda m, d: nn.functional.cross_entropy(m(d[0]), d[1]), b) for b in group]


@pytest.mark.parametrize(("name", "k"), [("sampled", 1), *((name, 3) for name in PARTS)])
def test_parts_of_the_batch_are_those_of_a_mean_batch(name: str, k: int) -> None:
    data = batches(3 * k)
    parts = prepared(PARTS[name], k)
    model, other = parts[0].unwrap_model(parts[1]), Net()
    torch.manual_seed(0)
    losses = train(parts, data)
    torch.manual_seed(0)
    optimizer = PARTS[name](sgd(other))
    theirs = [float(optimizer.step(accumulated(other, group))) for group in grouped(data, k)]
    assert losses == pytest.approx(theirs, rel=1e-5)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert parts[2].optimizer.telemetry.passes == pytest.approx(optimizer.telemetry.passes)


def test_a_radius_of_zero_is_the_plain_loop_bit_for_bit() -> None:
    """No part is asked for."""
    data = batches(6)
    parts = prepared(lambda base: PARTS["WSAM"](base, 0.0), 2)
    torch.manual_seed(0)
    losses = train(parts, data, clip=0.5)
    other = Net()
    torch.manual_seed(0)
    assert losses == plain_loop(other, steppe.SAM(sgd(other), 0.0), grouped(data, 2), clip=0.5)
    assert same(parts[0].unwrap_model(parts[1]), other)


@pytest.mark.parametrize("make", [lambda b: steppe.RWSAM(b, 0.1), lambda b: steppe.ESAM(b, 0.1)], ids=["RWSAM", "ESAM"])
def test_methods_of_single_examples_take_their_losses(make) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, other = Net(), Net()
    wrapped, optimizer = accelerator.prepare(model, make(sgd(model)))
    each = nn.CrossEntropyLoss(reduction="none")
    backward = Backward(accelerator, wrapped, optimizer, lambda model, b: each(model(b[0]), b[1]))
    data = batches(4)
    torch.manual_seed(0)
    losses = train((accelerator, wrapped, optimizer, backward), data)
    torch.manual_seed(0)
    theirs = make(sgd(other))
    assert losses == pytest.approx(
        [
            float(theirs.step([steppe.Batch.supervised(other, each, x, y) for x, y in group]))
            for group in grouped(data, 2)
        ]
    )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_methods_of_single_examples_say_what_they_need() -> None:
    with pytest.raises(ValueError, match=r"one loss per example.*got shape \(\)"):
        train(prepared(lambda base: steppe.RWSAM(base, rho=0.1)), batches(1))


def test_parts_may_weigh_by_their_tokens() -> None:
    x, y = batches(1)[0]
    y = y.clone()
    y[:6] = -100
    accelerator = accelerate.Accelerator(cpu=True)
    model, other = Net(), Net()
    wrapped, optimizer = accelerator.prepare(model, steppe.SAM(sgd(model), 0.1, m=4))
    tokens = lambda b: (b[1] != -100).sum()  # noqa: E731
    mean = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    torch.manual_seed(0)
    train((accelerator, wrapped, optimizer, Backward(accelerator, wrapped, optimizer, mean, weight=tokens)), [(x, y)])
    torch.manual_seed(0)
    steppe.SAM(sgd(other), 0.1, m=4).step(steppe.MeanBatch(other, mean, (x, y), weight=tokens))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
