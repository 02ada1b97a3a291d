"""What goes wrong in the shared passes and says nothing of the model: one serial step, and not for good."""

import copy
import logging

import pytest
import torch
from torch import nn

import steppe
from steppe.factored.engine import SharedPasses
from steppe.factored.plans import TRIES
from tests.cases import flat, same_bits, sgdm
from tests.factored_models import EXAMPLES, Example
from tests.models import Faulty
from tests.test_factored import N


def out_of_memory() -> Faulty:
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    return Faulty(net, how=lambda calls: torch.OutOfMemoryError(f"tried to allocate {1000 + calls} bytes"))


def whole_batch(x: torch.Tensor, calls: int) -> bool:
    return len(x) == N


example = Example(out_of_memory, EXAMPLES["mlp"].data)


def warm(make, steps: int = 3):
    """A model past its first rehearsals, its optimizer, and the batches of the next steps."""
    model = example.model(torch.float64)
    opt = make(sgdm(model))
    for k in range(steps):
        opt.step(example.batch(model, N, torch.float64, seed=k))
    assert opt.telemetry.forwards == 2
    return model, opt, [example.batch(model, N, torch.float64, seed=100 + k) for k in range(8)]


def serial_twin(model, opt):
    model, opt = copy.deepcopy((model, opt))
    opt._stepper.parallel = False
    return model, opt


def steps_in_shared_passes(model, opt, batch) -> bool:
    calls = model.calls
    opt.step(batch)
    return model.calls == calls + 2


@pytest.mark.usefixtures("rehearsed_once")
@pytest.mark.parametrize("at", [1, 2])
def test_one_step_without_memory_is_serial_and_the_next_is_not(at: int, caplog) -> None:
    model, opt, batches = warm(lambda base: steppe.SAM(base, 0.3, m=5))
    twin, serial = serial_twin(model, opt)
    model.fail_at = (model.calls + at,)
    for k in range(3):
        torch.manual_seed(k)
        with caplog.at_level(logging.INFO, "steppe"):
            opt.step(batches[k])
        if k == 0:  # the very step of the serial loop, dropout included
            torch.manual_seed(k)
            serial.step(steppe.Batch(twin, batches[k].loss, batches[k].data))
            assert same_bits(list(model.parameters()), list(twin.parameters()))
            model.fail_at = ()
    assert opt.telemetry.forwards == 2
    assert steps_in_shared_passes(model, opt, batches[3])
    assert len(caplog.records) == 1
    assert "in a loop in this step: OutOfMemoryError: tried to allocate" in caplog.records[0].message


@pytest.mark.usefixtures("rehearsed_once")
def test_steps_in_a_row_without_memory_are_for_good(caplog) -> None:
    model, opt, batches = warm(lambda base: steppe.SAM(base, 0.3, m=5))
    model.fail_at = whole_batch
    with caplog.at_level(logging.INFO, "steppe"):
        for k in range(TRIES - 1):
            opt.step(batches[k])
        model.fail_at = ()
        assert steps_in_shared_passes(model, opt, batches[2])  # which starts the count anew
        model.fail_at = whole_batch
        for k in range(TRIES - 1):
            opt.step(batches[k])
        with pytest.warns(UserWarning, match="run in a loop, because they cannot share passes here: OutOfMemory"):
            opt.step(batches[TRIES - 1])
        model.fail_at = ()
        calls = model.calls
        opt.step(batches[0])
        assert model.calls == calls + 2 * 3  # parts of 5, 5 and 2
    assert len(caplog.records) == 2  # "in this step", once, and for good
    assert "in this step" in caplog.records[0].message
    assert "in a loop: OutOfMemoryError" in caplog.records[1].message


@pytest.mark.usefixtures("rehearsed_once")
def test_bad_data_says_nothing_of_the_model() -> None:
    """The serial loop meets the same error, so that no step is taken: however often, the next good batch is shared."""
    model, opt, batches = warm(lambda base: steppe.SAM(base, 0.3, m=5))
    bad = steppe.Batch(model, batches[0].loss, (batches[0].data[0], batches[0].data[1] + 3))  # no such class
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2 * TRIES):
        with pytest.raises(IndexError, match="out of bounds"):
            opt.step(bad)
    assert same_bits(before, list(model.parameters()))
    assert steps_in_shared_passes(model, opt, batches[1])


def test_a_rehearsal_that_raises_is_tried_again() -> None:
    model = example.model(torch.float64)
    opt = steppe.SAM(sgdm(model), 0.3, m=5)
    batch = example.batch(model, N, torch.float64)
    model.fail_at = whole_batch
    opt.step(batch)
    model.fail_at = ()
    opt.step(batch)
    assert SharedPasses().entry(opt._stepper.oracle(batch), batch, 5).plan.reason == ""
    assert opt.telemetry.forwards == 2


@pytest.mark.usefixtures("rehearsed_once")
def test_parallel_true_gives_the_error_itself() -> None:
    model, opt, batches = warm(lambda base: steppe.SAM(base, 0.3, m=5, parallel=True))
    model.fail_at = whole_batch
    with pytest.raises(torch.OutOfMemoryError):
        opt.step(batches[0])
    model.fail_at = ()
    assert steps_in_shared_passes(model, opt, batches[0])


@pytest.mark.usefixtures("rehearsed_once")
@pytest.mark.parametrize("broken", ["norms", "weighted"])
def test_rw_sam_without_memory_takes_the_probe(broken: str, monkeypatch) -> None:
    _, opt, batches = warm(lambda base: steppe.RWSAM(base, 0.3))
    from steppe.factored.collect import Recorded

    def fails(self, *_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, broken, fails)
        opt.step(batches[0])
        assert opt.telemetry.forwards > 2
    opt.step(batches[1])
    assert opt.telemetry.forwards == 2


@pytest.mark.usefixtures("rehearsed_once")
@pytest.mark.parametrize("at", [1, 2, 3])
def test_accumulated_norms_without_memory_leave_no_trace(at: int) -> None:
    """The probe's step bit for bit, with its masks, statistics and random numbers, whichever batch it was."""

    def parts(batch):
        return batch.split(4)

    model = example.model(torch.float64)
    opt = steppe.RWSAM(sgdm(model), 0.3)
    for k in range(4):  # past the rehearsal at the eleventh use
        opt.step(parts(example.batch(model, N, torch.float64, seed=k)))
    assert opt.telemetry.forwards == pytest.approx(3)
    twin, serial = serial_twin(model, opt)
    batch = example.batch(model, N, torch.float64, seed=9)
    ends = []
    for net, optimizer in ((model, opt), (twin, serial)):
        net.fail_at = (net.calls + at,) if net is model else ()
        torch.manual_seed(3)
        optimizer.step(parts(steppe.Batch(net, batch.loss, batch.data)))
        ends.append([*net.state_dict().values(), torch.get_rng_state().long()])
    assert same_bits(*ends)
    model.fail_at, calls = (), model.calls
    opt.step(parts(batch))
    assert model.calls == calls + 9  # norms, the weighted gradient, and the one at w + eps


# ---- what a plan guards


def test_switches_after_the_rehearsal_are_noticed() -> None:
    """Every one of them is another entry, or serial: never the plan of what the model was before."""
    model = EXAMPLES["mlp"].model(torch.float64)
    opt = steppe.SAM(sgdm(model), 0.3, m=5)
    batch = EXAMPLES["mlp"].batch(model, N, torch.float64)

    def entry():
        return SharedPasses().entry(opt._stepper.oracle(batch), batch)

    first = entry()
    assert not first.plan.reason

    def back(change, undo) -> bool:
        """Whether a change asks for another entry, and undoing it for the same."""
        change()
        other = entry() is not first
        undo()
        return other and entry() is first

    weight = model[0].weight
    assert back(lambda: model[2].eval(), lambda: model[2].train())
    assert back(lambda: weight.requires_grad_(False), lambda: weight.requires_grad_(True))
    handles = []
    assert back(lambda: handles.append(weight.register_hook(lambda g: 2 * g)), lambda: handles.pop().remove())
    hook = lambda m, i, o: None  # noqa: E731
    assert back(lambda: handles.append(model[3].register_full_backward_hook(hook)), lambda: handles.pop().remove())
    assert back(lambda: model[3].compile(backend="eager"), lambda: setattr(model[3], "_compiled_call_impl", None))
    assert back(lambda: opt.param_groups[0].update(rho=0.0), lambda: opt.param_groups[0].update(rho=0.3))
    with torch.autocast("cpu", torch.bfloat16):
        assert entry() is not first
    model.append(nn.Identity())
    assert entry() is not first


@pytest.mark.filterwarnings("ignore:micro-batches of m=4 run in a loop")
def test_a_backward_hook_of_a_module_added_later_sees_micro_batches() -> None:
    found = []
    for parallel in ("auto", False):
        model = EXAMPLES["mlp"].model(torch.float64)
        opt = steppe.SAM(sgdm(model), 0.3, m=4, parallel=parallel)
        for k in range(4):
            if k == 2:
                model[3].register_full_backward_hook(lambda m, gi, go: (gi[0] / (1e-3 + gi[0].norm()),))
            opt.step(EXAMPLES["mlp"].batch(model, N, torch.float64, seed=k))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
