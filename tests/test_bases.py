"""Base optimizers of every shape: nothing of theirs is lost, taken for steppe's own, or saved in another way."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import steppe
from tests.bases import Behind, Quantised, Recent, Slow, Tuned, Warmed
from tests.cases import World, same_bits, sgd, sgdm, world

Make = Callable[[list[Tensor]], Optimizer]


def in_parts(parameters: list[Tensor]) -> list[Optimizer]:
    """Muon for the matrices, AdamW for the rest, in two groups."""
    matrices = [p for p in parameters if p.ndim == 2]
    first, *others = [p for p in parameters if p.ndim != 2]
    groups = [{"params": [first], "lr": 0.02}, {"params": others}]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(groups, lr=0.01)]


BASES: dict[str, Make] = {
    "Warmed": Warmed,
    "Quantised": Quantised,
    "Slow": lambda ps: Slow(torch.optim.AdamW(ps, lr=0.01)),
    "Slow twice": lambda ps: Slow(Slow(torch.optim.SGD(ps, lr=0.1, momentum=0.9))),
    "Behind": lambda ps: Behind(torch.optim.AdamW(ps, lr=0.01)),
    "Tuned": lambda ps: Tuned(torch.optim.AdamW(ps, lr=0.01)),
    "Recent": Recent,
    "Adadelta": lambda ps: torch.optim.Adadelta(ps, lr=0.1, rho=0.8),
    "Slow Adadelta": lambda ps: Slow(torch.optim.Adadelta(ps, lr=0.1, rho=0.8)),
    "Joint": lambda ps: steppe.Joint(in_parts(ps)),
    "Joint of own formats": lambda ps: steppe.Joint([Warmed(ps[:2]), Slow(torch.optim.AdamW(ps[2:]))]),
}
each = pytest.mark.parametrize("make", BASES.values(), ids=BASES)


def saved(optimizer: Optimizer) -> dict:
    """The checkpoint of an optimizer, from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def run(optimizer: Optimizer, w: World, steps: slice) -> None:
    for batch in w.batches(8)[steps]:
        optimizer.step(batch)


@each
def test_radius_zero_is_the_base_alone(make: Make) -> None:
    ours, theirs = world(), world()
    opt, base = steppe.SAM(make(ours.parameters()), rho=0.0), make(theirs.parameters())
    run(opt, ours, slice(0, 5))
    for batch in theirs.batches(8)[:5]:
        batch()
        base.step()
    assert same_bits(ours.parameters(), theirs.parameters())


@each
@pytest.mark.parametrize("method", [steppe.SAM, steppe.FSAM], ids=lambda m: m.__name__)
def test_it_resumes_bit_for_bit(make: Make, method: type[steppe.SharpnessAware]) -> None:
    ours = world()
    opt = method(make(ours.parameters()), rho=0.3)
    run(opt, ours, slice(0, 3))
    theirs = copy.deepcopy(ours)
    other = method(make(theirs.parameters()), rho=0.1)
    other.load_state_dict(saved(opt))
    assert other._stepper.radius.update(other.param_groups).values == [0.3] * len(ours.parameters())
    run(opt, ours, slice(3, 8))
    run(other, theirs, slice(3, 8))
    assert same_bits(ours.parameters(), theirs.parameters())
    assert opt.telemetry.steps == other.telemetry.steps == 8


@each
def test_a_checkpoint_of_the_base_alone_loads(make: Make) -> None:
    ours, theirs = world(), world()
    base, opt = make(ours.parameters()), steppe.FSAM(make(theirs.parameters()), rho=0.0)
    run(opt, theirs, slice(0, 2))
    for batch in ours.batches(8)[:3]:
        batch()
        base.step()
    opt.load_state_dict(saved(base))
    theirs.model.load_state_dict(ours.model.state_dict())
    for batch in ours.batches(8)[3:]:
        batch()
        base.step()
    run(opt, theirs, slice(3, 8))
    assert same_bits(ours.parameters(), theirs.parameters())
    assert opt.telemetry.rho == 0.0


COPIED = [name for name in BASES if name not in ("Warmed", "Joint of own formats")]  # torch copies no attributes


@pytest.mark.parametrize("name", COPIED)
def test_copies_go_on_alike(name: str) -> None:
    ours = world()
    opt = steppe.FSAM(BASES[name](ours.parameters()), rho=0.3)
    run(opt, ours, slice(0, 3))
    copies = [copy.deepcopy((ours, opt)), pickle.loads(pickle.dumps((ours, opt)))]
    run(opt, ours, slice(3, 5))
    for w, other in copies:
        run(other, w, slice(3, 5))
        assert same_bits(ours.parameters(), w.parameters())
        assert all(p in other.state for p in w.parameters())


def test_a_format_of_its_own_without_the_rule_s_memory_says_whose_it_is() -> None:
    """As 0.1 wrote for such a base: torch's format, without what the inner optimizer has."""
    w = world()
    opt = steppe.SAM(Slow(sgdm(w)))
    with pytest.raises(KeyError, match=r"Slow finds no 'optimizer' .* steppe 0\.1"):
        opt.load_state_dict(sgdm(w).state_dict())


@pytest.mark.parametrize("name", ["Slow", "Joint of own formats", "Joint of both"])
def test_a_checkpoint_that_fails_midway_leaves_nothing_half_done(name: str) -> None:
    """The slow weights are missing, which is found when the inner optimizer, and the optimizers before, have loaded."""
    both = lambda ps: steppe.Joint([torch.optim.AdamW(ps[:2]), Slow(torch.optim.AdamW(ps[2:]))])  # noqa: E731
    makes = BASES | {"Joint of both": both}
    ours, theirs = world(), world()
    opt, other = (steppe.FSAM(makes[name](w.parameters()), rho=0.3) for w in (ours, theirs))
    run(opt, ours, slice(0, 3))
    broken = saved(opt)
    run(opt, ours, slice(3, 5))
    run(other, theirs, slice(0, 5))
    del (broken["bases"][-1] if "bases" in broken else broken)["slow"]
    with pytest.raises(KeyError, match="finds no 'slow' in this checkpoint"):
        opt.load_state_dict(broken)
    run(opt, ours, slice(5, 8))
    run(other, theirs, slice(5, 8))
    assert same_bits(ours.parameters(), theirs.parameters())


def test_a_checkpoint_of_0_1_of_a_quantised_base_loads() -> None:
    """0.1 wrote torch's format, with the memory in the entries of every parameter."""
    ours, theirs = world(), world()
    opt, other = (steppe.FSAM(Quantised(w.parameters()), rho=0.2) for w in (ours, theirs))
    run(opt, ours, slice(0, 2))
    theirs.model.load_state_dict(ours.model.state_dict())
    entries = opt.state_dict()["state"][0]
    assert set(entries) == {"m", "scale", "sharpness.friendly"}
    other.load_state_dict(saved(opt))
    assert other.base.state[theirs.parameters()[0]]["m"].dtype == torch.uint8
    run(opt, ours, slice(2, 4))
    run(other, theirs, slice(2, 4))
    assert same_bits(ours.parameters(), theirs.parameters())


def test_hooks_of_checkpoints_run_also_for_a_format_of_its_own() -> None:
    w, seen = world(), []
    opt = steppe.SAM(Warmed(w.parameters()))
    opt.register_state_dict_pre_hook(lambda o: seen.append("before saving"))
    opt.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda o, s: seen.append(s["extra"]))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before saving", 1, "loaded"]


# ---- a base that has an option of the name rho


def test_adadelta_keeps_its_rho_and_the_radius_has_a_name_of_its_own() -> None:
    w = world()
    norms = list(w.model[1].parameters())
    rest = [p for p in w.parameters() if all(p is not q for q in norms)]
    groups = [{"params": rest}, {"params": norms, "sharpness_rho": 0.0}]
    opt = steppe.SAM(torch.optim.Adadelta(groups, rho=0.8), rho=0.3)
    opt.step(w.batch)
    assert [(g["rho"], g["sharpness_rho"]) for g in opt.param_groups] == [(0.8, 0.3), (0.8, 0.0)]
    torch.testing.assert_close(opt.telemetry.eps_norm, torch.tensor(0.3, dtype=torch.float64))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": 0.7})
    assert (opt.param_groups[2]["rho"], opt.param_groups[2]["sharpness_rho"]) == (0.7, 0.3)
    with pytest.raises(ValueError, match="sharpness_rho must be"):
        steppe.SAM(torch.optim.Adadelta([{"params": rest, "sharpness_rho": -1.0}]))
    assert "rho=[0.3, 0.0, 0.3]" in repr(opt)


def test_a_checkpoint_of_0_1_of_adadelta_loads_with_the_radius_that_was_asked_for() -> None:
    w = world()
    opt = steppe.SAM(torch.optim.Adadelta(w.parameters()), rho=0.2)
    written = saved(opt)
    for group in written["param_groups"]:
        assert group.pop("sharpness_rho") == 0.2  # 0.1 took Adadelta's own, 0.9
    opt.load_state_dict(written)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["sharpness_rho"]) == (0.9, 0.2)


# ---- parameters that are listed twice, or lie on one memory


def test_parameters_that_share_memory_are_refused_by_name() -> None:
    encoder, decoder = (nn.Linear(4, 4, bias=False) for _ in range(2))
    decoder.weight = nn.Parameter(encoder.weight.detach())
    with pytest.raises(ValueError, match=r"params must not share memory.*decoder\.weight = encoder\.weight"):
        steppe.SAM(sgd([encoder.weight, decoder.weight]))
    opt = steppe.SAM(sgd([encoder.weight]))
    with pytest.raises(ValueError, match="params must not share memory"):
        opt.add_param_group({"params": decoder.parameters()})
    assert len(opt.param_groups) == 1
    buffer = torch.zeros(10)
    with pytest.raises(ValueError, match="params must not share memory"):
        steppe.SAM(sgd([nn.Parameter(buffer[:6]), nn.Parameter(buffer[5:])]))
    interleaved = [nn.Parameter(buffer[::2]), nn.Parameter(buffer[1::2])]
    steppe.SAM(sgd([*interleaved, nn.Parameter(torch.zeros(0))]))


def test_memory_that_is_shared_after_the_optimizer_was_made_comes_back() -> None:
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    opt = steppe.SAM(sgd(layers, lr=0.0), rho=0.5)
    with torch.no_grad():
        layers[2].weight.set_(layers[0].weight.detach())
    before = layers[0].weight.detach().clone()
    x = torch.randn(8, 4)

    def closure() -> Tensor:
        loss = (layers(x) - x).square().mean()
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.equal(before, layers[0].weight)


def test_a_parameter_listed_twice_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"):
        base = sgd([p, p])
    with pytest.raises(ValueError, match="params must hold every parameter once"):
        steppe.SAM(base)


def test_parameters_on_the_meta_device_are_refused() -> None:
    with pytest.raises(TypeError, match="params must hold numbers"):
        steppe.SAM(sgd(nn.Linear(2, 2, device="meta")))


class Asks(torch.optim.SGD):
    """Cannot step without a closure."""

    def step(self, closure):  # type: ignore[override]
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, Asks])
def test_bases_that_call_a_closure_are_refused_by_name(kind: type[Optimizer]) -> None:
    base = kind([nn.Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match=f"got {kind.__name__}, which calls a closure by itself"):
        steppe.SAM(base)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_bases_that_average_weights_are_refused() -> None:
    from torch.distributed.optim import PostLocalSGDOptimizer

    base = PostLocalSGDOptimizer(sgd(world()), averager=None)
    with pytest.raises(TypeError, match="base must not be a PostLocalSGDOptimizer"):
        steppe.SAM(base)


@pytest.mark.parametrize("make", [Warmed, sgd], ids=["own format", "torch's"])
def test_a_checkpoint_loads_after_a_group_was_added_to_the_base(make: Make) -> None:
    w, extra = world(), nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = steppe.SAM(make(w.parameters()), rho=0.2)
    opt.step(w.batch)
    opt.base.add_param_group({"params": [extra]})
    opt.load_state_dict(opt.state_dict())
    opt.step(w.batch)
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.2]
    assert opt.telemetry.steps == 2


# ---- what users write


def test_the_page_on_base_optimizers_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "stacks" / "base-optimizers.md").read_text()
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "base-optimizers.md", "exec"), names)
    assert names["optimizer"].telemetry.passes == 2


def test_what_is_set_on_the_wrapper_is_set_on_the_base() -> None:
    """fastai forgets the state so, and Lightning's wrapper sets all three."""
    w = world()
    opt = steppe.SAM(sgdm(w))
    opt.step(w.batch)
    groups = [dict(group, lr=0.5) for group in opt.param_groups]
    opt.state, opt.param_groups = defaultdict(dict), groups
    opt.defaults = defaults = {**opt.defaults, "lr": 0.5}
    assert opt.base.state == {}
    assert opt.base.defaults is defaults
    assert opt.base.param_groups is groups
    opt.step(w.batch)
    assert set(opt.base.state) == set(w.parameters())


def test_the_manner_of_sam_py_is_told_what_to_write() -> None:
    w = world()
    for call in (
        lambda: steppe.SAM(w.parameters(), torch.optim.SGD, rho=0.05, lr=0.1),
        lambda: steppe.WSAM(w.model.parameters(), base_optimizer=torch.optim.SGD),
    ):
        with pytest.raises(TypeError, match=r"takes an optimizer.*write \w+SAM\(torch\.optim\.SGD|write SAM"):
            call()
    with pytest.raises(TypeError, match=r"write ASAM\(base, rho\)"):
        steppe.SAM(sgd(w), adaptive=True)
    with pytest.raises(TypeError, match=r"write SAM\(torch\.optim\.SGD\(params, lr=0\.2\)\)"):
        steppe.SAM(sgd(w), lr=0.2)
    with pytest.raises(TypeError, match="the radius of a group stands in the group"):
        steppe.SAM(sgd(w), rho=[0.1, 0.2])
    opt = steppe.SAM(sgd(w))
    assert opt.base_optimizer is opt.base


def test_modes_of_schedule_free_bases_are_handed_on() -> None:
    class Modal(torch.optim.SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    w = world()
    for opt in (steppe.SAM(Modal(w.parameters())), steppe.SAM([Modal(w.parameters()[:2]), sgd(w.parameters()[2:])])):
        first = getattr(opt.base, "bases", (opt.base,))[0]
        opt.train()
        assert first.mode == "train"
        opt.eval()
        assert first.mode == "eval"
    steppe.SAM(sgd(w)).train()


# ---- several optimizers as one


def test_names_that_one_of_several_optimizers_lacks_are_known_of_none() -> None:
    w = world()
    named = list(w.model.named_parameters())
    bases = [sgd(named[:2]), sgd([p for _, p in named[2:]])]
    steppe.SAM(bases).step(w.batch)
    with pytest.raises(TypeError, match="needs parameter names"):
        steppe.ASAM([sgd(named[:2]), sgd([p for _, p in named[2:]])], on=steppe.Named()).step(w.batch)


def test_several_optimizers_are_one_base() -> None:
    w = world()
    bases = in_parts(w.parameters())
    opt = steppe.SAM(bases, rho=0.3)
    assert isinstance(opt.base, steppe.Joint)
    assert repr(opt.base).startswith("Joint([Muon (")
    assert [len(g["params"]) for g in opt.param_groups] == [2, 1, 3]
    before, seen = w.weights(), []
    w.model.register_forward_hook(lambda *_: seen.append(w.weights()))
    opt.step(w.batch)
    eps = torch.cat([(a - b).flatten() for a, b in zip(seen[1], before, strict=True)])
    torch.testing.assert_close(eps.norm(), torch.tensor(0.3, dtype=torch.float64))
    assert set(opt.state) == set(w.parameters())
    assert [g["lr"] for g in opt.param_groups] == [0.02, 0.02, 0.01]


def test_schedulers_of_one_of_them_and_of_all() -> None:
    w = world()
    bases = in_parts(w.parameters())
    opt = steppe.SAM(bases, rho=steppe.schedule.Linear(0.1, 0.3, 2))
    one = torch.optim.lr_scheduler.ExponentialLR(bases[0], 0.5)
    every = torch.optim.lr_scheduler.ExponentialLR(opt, 0.1)
    opt.step(w.batch)
    one.step()
    every.step()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.001, 0.002, 0.001])
    opt.step(w.batch)
    assert [g["rho"] for g in opt.param_groups] == [0.2, 0.2, 0.2]
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9)


def test_a_group_is_added_to_one_of_them() -> None:
    w, extra = world(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    bases = in_parts(w.parameters())
    bases[1].param_groups[0]["rho"] = 0.0
    opt = steppe.SAM(bases, rho=lambda step, group: 0.1 * step)
    opt.step(w.batch)
    with pytest.raises(TypeError, match=r"bases\[0\]\.add_param_group"):
        opt.add_param_group({"params": [extra]})
    assert len(opt.param_groups) == 3
    bases[0].add_param_group({"params": [nn.Parameter(torch.ones(2, 2, dtype=torch.float64))]})
    opt.step(w.batch)
    assert [g["rho"] for g in opt.param_groups] == [0.1, 0.1, 0.0, 0.1]  # a radius of one's own stays with its group


def test_what_is_no_joint() -> None:
    w = world()
    with pytest.raises(ValueError, match="bases must be one optimizer or more"):
        steppe.SAM([])
    with pytest.raises(ValueError, match="bases must have parameters of their own"):
        steppe.Joint([sgd(w), sgd(w)])
    with pytest.raises(TypeError, match="base must be an optimizer instance"):
        steppe.Joint([sgd(w), torch.optim.SGD])
    with pytest.raises(ValueError, match="not wrapped"):
        steppe.Joint([steppe.SAM(sgd(w))])
    joint = steppe.Joint(in_parts(w.parameters()))
    with pytest.raises(ValueError, match="the groups of this optimizer"):
        joint.load_state_dict(sgd(w).state_dict())
    with pytest.raises(ValueError, match="of 2 optimizers, got 1"):
        joint.load_state_dict({"bases": [{}]})


def test_its_step_may_take_a_closure() -> None:
    ours, theirs = world(), world()
    joint, parts = steppe.Joint(in_parts(ours.parameters())), in_parts(theirs.parameters())
    loss = joint.step(ours.batch)
    torch.testing.assert_close(loss, theirs.batch())
    for base in parts:
        base.step()
    assert same_bits(ours.parameters(), theirs.parameters())


# ---- what closures return


@dataclass
class Output:
    loss: Tensor


class Named(NamedTuple):
    logits: int
    loss: Tensor


RETURNED = {
    "dict": lambda loss: {"logits": None, "loss": loss},
    "tuple": lambda loss: (loss, "logits"),
    "list": lambda loss: [loss],
    "named tuple": lambda loss: Named(0, loss),
    "output": Output,
    "number": lambda loss: loss.item(),
    "one element": lambda loss: loss.reshape(1),
}


@pytest.mark.parametrize("returned", RETURNED.values(), ids=RETURNED)
def test_the_loss_is_found_in_what_a_closure_returns(returned: Callable[[Tensor], object]) -> None:
    w = world()
    opt = steppe.SAM(sgd(w))
    loss = opt.step(lambda: returned(w.batch()))
    torch.testing.assert_close(torch.as_tensor(loss).reshape(()), torch.as_tensor(opt.telemetry.loss).reshape(()))
    assert opt.telemetry.gap > 0


@pytest.mark.parametrize("returned", [None, {}, {"logits": 1.0}, (), "loss", torch.ones(3), Output(None)], ids=repr)
def test_what_is_no_loss_is_refused_before_anything_moves(returned: object) -> None:
    w = world()
    opt, before = steppe.SAM(sgd(w)), w.weights()
    with pytest.raises(TypeError, match="closure must return the loss, one number"):
        opt.step(lambda: (w.batch(), returned)[1])
    assert same_bits(before, w.parameters())


# ---- threads


def test_two_threads_with_running_statistics_do_not_meet() -> None:
    """The hook that looks for modules is called in every thread."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    here, there = world(torch.float32, model), world(torch.float32, model, seed=1)
    alone = copy.deepcopy((here, there))
    opt, other = steppe.SAM(sgd(here), rho=0.3), steppe.SAM(sgd(there), rho=0.3)
    with ThreadPoolExecutor(1) as thread:
        calls = 0

        def closure() -> Tensor:  # in its second pass, another thread takes a whole step
            nonlocal calls
            calls += 1
            if calls == 2:
                thread.submit(other.step, there.batch).result()
            return here.batch()

        opt.step(closure)
    for w, expected in zip((here, there), alone, strict=True):
        steppe.SAM(sgd(expected), rho=0.3).step(expected.batch)
        assert same_bits(list(w.model.state_dict().values()), list(expected.model.state_dict().values()))
