"""Long random programs of ordinary and of unlucky events: nothing drifts, nothing leaks, nothing is half done.

``STEPPE_SOAK=20`` makes every program twenty times as long. A program is drawn from its name and repeats.
"""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import steppe
from steppe import Masked, SharpnessAware
from steppe.factored.engine import SharedPasses
from tests import reference
from tests.cases import (
    BASES,
    COMBINATIONS,
    METHODS,
    MICRO,
    MORE_THAN_TWO,
    PARALLEL,
    Case,
    N,
    World,
    assert_equal_states,
    named,
    same_bits,
)
from tests.models import Branches, Faulty
from tests.processes import processes
from tests.reference import Base, Problem

LONGER = int(os.environ.get("STEPPE_SOAK", "1"))
EXACT = {"RWSAM", "parallel m-RWSAM", "ReweightedSharpness"}  # exact norms, where the model factors
TWO_GRADIENTS = {c.name for c in METHODS if not c.looks_inside} - MORE_THAN_TWO


class BrokenError(Exception):
    """What a pass raises."""


BOTH, ONE = [[0, 1]], [[0]]  # the last branch is never used


def unlucky(branches: list[nn.Module]) -> Faulty:
    """Two branches, of which one may be left out, and one that nobody uses; passes may raise or be spoiled."""
    return Faulty(Branches([*branches, nn.Linear(2, 2)], pattern=BOTH))


# ------------------------------------------------------------------------------------------------------------ programs


class Rate:
    """A learning rate that is 0 at times."""

    def __init__(self, lr: float) -> None:
        self.lr = self.now = lr

    def toggle(self) -> None:
        self.now = self.lr - self.now


EVENTS = {"none": 40, "raise_at": 12, "spoil_at": 12, "left out": 8, "freeze": 4, "lr": 4, "copy": 4, "resume": 4}


def draw_event(draw: random.Random, p: Program, rate: Rate, never: tuple[str, ...] = ()) -> str:
    """What happens before the next step, or in it."""
    event = draw.choices(list(EVENTS), [0 if e in never else n for e, n in EVENTS.items()])[0]
    if event == "freeze":
        p.freeze(not p.frozen)
    elif event == "lr":
        rate.toggle()
        p.set_lr(rate.now)
    elif event == "copy":
        p.copy()
    elif event == "resume":
        p.resume()
    return event


def steps_of(p: Program, never: tuple[str, ...] = ()) -> Iterator[int]:
    """Number the steps: 24, and more until a pass has raised and a step was skipped."""
    wanted = [kind for kind, event in (("raised", "raise_at"), ("skipped", "spoil_at")) if event not in never]
    for step in range(200 * LONGER):
        if step >= 24 * LONGER and all(p.seen[kind] for kind in wanted):
            return
        yield step


class Program:
    """An optimizer and its model, and what may happen to both."""

    def __init__(self, case: Case, base: str, fresh: Callable[[], World]) -> None:
        self.case, self.base, self.fresh = case, base, fresh
        self.world, self.frozen = fresh(), False
        self.opt = self.make(self.world)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=50)
        self.seen = dict.fromkeys(("taken", "raised", "skipped"), 0)

    def make(self, world: World) -> SharpnessAware:
        groups = [{"params": list(branch.parameters())} for branch in world.model.net.branches]
        groups.append({"params": []})
        return self.case.make(BASES[self.base](groups), world, 0.1)

    @property
    def model(self) -> Faulty:
        return self.world.model

    @property
    def branches(self) -> nn.ModuleList:
        return self.model.net.branches

    def used(self) -> list[Tensor]:
        return [p for branch in self.branches[:2] for p in branch.parameters()]

    def idle(self) -> list[Tensor]:
        return list(self.branches[2].parameters())

    def leave_out(self, event: str) -> None:
        self.model.net.pattern = ONE if event == "left out" else BOTH

    def ways(self) -> list[str]:
        """How this method can be run."""
        ways = ["batch", "backward", "list"]
        if not self.case.looks_inside:
            ways.append("closure")
        if self.case.name in TWO_GRADIENTS:
            ways.append("two calls")
        return ways

    def step(self, way: str, x: Tensor, y: Tensor, scaled: bool = False) -> str:
        """One step, come what may: "taken", "raised" or "skipped". What is not taken leaves no trace."""
        self.world.x, self.world.y = x, y
        batch, scaler = self.world.batch, self.scaler if scaled else None
        before, state = self.world.weights(), copy.deepcopy(self.opt.state_dict())
        try:
            self._run(way, batch.scaled_by(scaler), scaler)
            if scaler is not None:
                scaler.update()
            what = "skipped" if self.opt.telemetry.was_skipped else "taken"
        except BrokenError:
            what = "raised"
        self.seen[what] += 1
        if what != "taken":
            assert same_bits(before, self.world.parameters())
            assert_equal_states(self.opt.state_dict(), state)
        assert all(p.isfinite().all() for p in self.world.parameters())
        assert all(p.requires_grad for p in self.idle())
        assert_no_hooks(self.model)
        return what

    def _run(self, way: str, batch: steppe.Batch, scaler: torch.amp.GradScaler | None) -> None:
        opt = self.opt
        if way == "batch":
            opt.step(batch)
        elif way == "list":
            opt.step([batch.subset(torch.arange(a, b)) for a, b in ((0, 4), (4, 8), (8, N))])
        elif way == "closure":
            opt.step(lambda: batch(), scaler=scaler)
        elif way == "backward":
            opt.backward(batch)
            opt.step()
        else:
            start = torch.get_rng_state()
            batch()
            opt.first_step(scaler=scaler)
            end = torch.get_rng_state()
            torch.set_rng_state(start)  # the loop's own affair: the same dropout masks
            try:
                batch()
            except BrokenError:
                opt.cancel_step()
                raise
            finally:
                torch.set_rng_state(end)
            opt.second_step(zero_grad=True)

    # ---- events

    @contextmanager
    def unlucky(self, event: str, k: int):
        """Pass ``k`` of the step raises, or is spoiled, if that is the event."""
        if event.endswith("_at"):
            self.model.fail_at = (self.model.calls + k,)
            self.model.how = BrokenError if event == "raise_at" else torch.nan
        try:
            yield
        finally:
            self.model.fail_at = ()

    def rehearse(self, x: Tensor, y: Tensor) -> None:
        """Shared passes are rehearsed now, so that what follows meets the passes themselves."""
        self.world.x, self.world.y = x, y
        for m in {getattr(self.opt._stepper.rule, "m", None), None}:
            SharedPasses().entry(self.opt._stepper.oracle(self.world.batch), self.world.batch, m)

    def copy(self) -> None:
        """A copy goes on in place of the original."""
        self.world, self.opt = copy.deepcopy((self.world, self.opt))

    def resume(self) -> None:
        """What is saved goes on in a fresh model and a fresh optimizer."""
        file, model = io.BytesIO(), self.model
        torch.save({"model": model.state_dict(), "optimizer": self.opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        self.world = self.fresh()
        for old, new in zip(model.parameters(), self.world.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        self.opt = self.make(self.world)
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["optimizer"])

    def freeze(self, frozen: bool) -> None:
        """One group takes no part for a while."""
        self.frozen = frozen
        self.branches[1].requires_grad_(not frozen)

    def set_lr(self, lr: float) -> None:
        for group in self.opt.param_groups:
            group["lr"] = lr


def assert_no_hooks(model: nn.Module) -> None:
    assert not global_hooks._global_forward_pre_hooks
    assert not global_hooks._global_forward_hooks
    for m in model.modules():
        assert not m._forward_pre_hooks
        assert not m._forward_hooks
        assert m.training
    for p in model.parameters():
        assert not p._backward_hooks
        assert not getattr(p, "_post_accumulate_grad_hooks", None)


# ----------------------------------------------------------------------------------------------- against the reference


class Two(nn.Module):
    """A linear layer on two of the inputs."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.layer = start, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[:, self.start : self.start + 2])


class Squares(nn.Module):
    """``f_i = norm(out_i - y_i)^2 / 2``."""

    reduction = "none"

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (out - y).square().sum(1)


def least_squares() -> World:
    torch.manual_seed(3)
    x, y = torch.randn(3 * N, 4, dtype=torch.float64), torch.randn(3 * N, 2, dtype=torch.float64)
    return World(unlucky([Two(0), Two(2)]).double(), x[:N], y[:N], x, y, Squares())


def problem(x: Tensor, y: Tensor, w: Tensor, both: bool, trained: Tensor, full: Problem | None = None) -> Problem:
    """The same squares on the flat vector of the tensors that take part, the others as they are in ``w``."""
    one, eye = torch.ones(len(x), 2, 1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    layers = [torch.einsum("od,ni->nodi", eye, x[:, a : a + 2]).reshape(len(x), 2, 4) for a in (0, 2)]
    J = torch.cat([layers[0], eye * one, layers[1] * both, eye * one * both], 2)  # d out / d w
    rest = torch.einsum("noi,i->no", J[:, :, ~trained], w[~trained]) - y
    J = J[:, :, trained]
    return Problem(
        rows=slice(0, len(x)),
        losses_of=lambda v, r: 0.5 * (J[r] @ v + rest[r]).square().sum(1),
        grads_of=lambda v, r: torch.einsum("noi,no->ni", J[r], J[r] @ v + rest[r]),
        shapes=[torch.Size((2, 2)), torch.Size((2,))] * (len(trained[trained]) // 6),
        full=full,
    )


SIZES = [4, 2, 4, 2]
OF_REFERENCE: dict[str, tuple[str, dict]] = {
    "SAM": ("SAM", {}),
    "USAM": ("USAM", {}),
    "UnifiedSAM": ("UnifiedSAM", {"lam": 0.3}),
    "ASAM": ("ASAM", {"eta": 0.01}),
    "FisherSAM": ("FisherSAM", {"eta": 1.0}),
    "GSAM": ("GSAM", {"alpha": 0.4}),
    "ESAM": ("ESAM", {"beta": 0.6, "gamma": 0.5}),
    "ESAM-all": ("ESAM", {"beta": 0.6, "gamma": 1.0}),
    "WSAM": ("WSAM", {"gamma": 0.9}),
    "CoupledWSAM": ("CoupledWSAM", {"gamma": 0.9}),
    "NSAM": ("NSAM", {}),
    "RWSAM": ("RWSAM", {"lam": 0.5}),
    "RWSAM probe": ("RWSAMProbe", {"lam": 0.5}),
    "LookSAM": ("LookSAM", {"k": 2, "alpha": 0.7}),
    "FSAM": ("FSAM", {"sigma": 0.7, "decay": 0.9}),
    "VaSSO": ("VaSSO", {"theta": 0.4}),
    "LESAM": ("LESAM", {"sigma": 0.05}),
    "XSAM fixed": ("XSAM", {"alpha": 1.5}),
    "SSAM": ("SSAM", {}),
    "SANER": ("SANER", {"alpha": 0.7}),
    "LightSAM": ("LightSAM", {}),
    "GAM": ("GAM", {"alpha": 0.6}),
    "m-SANER": ("SANER", {"alpha": 0.5}),
    "ZSharp": ("ZSharp", {"q": 0.6}),
    "GCSAM": ("GCSAM", {}),
    "LookbehindSAM": ("LookbehindSAM", {"k": 2, "alpha": 0.5}),
    "AESAM": ("AESAM", {"start": 0.5, "end": -1.0, "steps": 4, "decay": 0.9}),
    "WSAM clip": ("WSAMClip", {"gamma": 0.9, "clip_each": 1.0}),
    "ReweightedSharpness": ("ReweightedSharpness", {"size": 4}),
    "MomentumSAM": ("MomentumSAM", {}),
    "PreconditionedSAM": ("PreconditionedSAM", {}),
    "m-UnifiedSAM": ("UnifiedSAM", {"lam": 0.5}),
    "m-ESAM": ("ESAM", {"beta": 1.0, "gamma": 0.5}),
    "m-RWSAM": ("RWSAMProbe", {"lam": 0.5}),
    "m-FSAM": ("FSAM", {"sigma": 1.0, "decay": 0.9}),
    "m-VaSSO": ("VaSSO", {"theta": 0.9}),
    "parallel m-RWSAM": ("RWSAM", {"lam": 0.5}),
}
FLAT_BASES = {
    "momentum": lambda: Base("momentum", 0.05, weight_decay=1e-2),
    "adamw": lambda: Base("adamw", 1e-2, weight_decay=0.1),
}


OTHERWISE = {"m-AESAM", "m-ReweightedSharpness"}  # one choice for all micro-batches; probed norms
OWN = {"MomentumSAM": named(steppe.MomentumSAM), "PreconditionedSAM": named(steppe.PreconditionedSAM)}
OWN |= {"WSAM clip": named(steppe.WSAM, clip_each=1.0)}  # so small that it clips


def in_reference(case: Case) -> str | None:
    """The name of a case in ``OF_REFERENCE``; other methods meet the reference in ``test_reference.py``."""
    if case.name in OTHERWISE:
        return None
    names = (case.name, case.name.removeprefix("parallel "), case.name.split("m-")[-1])
    return next((name for name in names if name in OF_REFERENCE), None)


class Flat:
    """The reference's run: a tensor that takes no part in a step is not there, to the method and to the base."""

    def __init__(self, case: Case, base: str, w: Tensor) -> None:
        self.method, self.hyper = OF_REFERENCE[in_reference(case)]
        self.m = 4 if "m-" in case.name else None
        self.w, self.bases = w.clone(), [FLAT_BASES[base]() for _ in SIZES]
        self.memory: dict[str, Tensor] = {}
        self.t = 0

    def step(self, x: Tensor, y: Tensor, world: World, both: bool, frozen: bool, lr: float) -> None:
        there = torch.tensor([True, True, both and not frozen, both and not frozen])
        by_momentum = torch.tensor([True, True, not frozen, not frozen])  # what is left out has one, too
        trained = (by_momentum if self.method == "MomentumSAM" else there).repeat_interleave(torch.tensor(SIZES))
        full = problem(world.full_x, world.full_y, self.w, both, trained)
        p = problem(x, y, self.w, both, trained, full)
        memory = {k: v[trained] if v.dim() else v for k, v in self.memory.items()}
        method = reference.METHODS[self.method](**self.hyper, **self.drawn(there, frozen))
        state = self.state(trained)
        u, beside, memory = reference.direction(method, p, self.w[trained], memory, self.t, 0.1, self.m, state)
        for name, v in memory.items():
            known = self.memory.get(name, torch.zeros_like(self.w))
            self.memory[name] = known.masked_scatter(trained, v) if v.dim() else v
        w = self.w.clone()
        ws, us, besides = (torch.zeros_like(w).masked_scatter(trained, v) for v in (w[trained], u, beside))
        pieces = zip(self.bases, there, ws.split(SIZES), us.split(SIZES), besides.split(SIZES), strict=True)
        moved = []
        for base, here, piece, of_u, of_beside in pieces:
            base.lr = lr
            moved.append(base.step(piece, of_u) - lr * of_beside if here else piece)
        self.w = torch.where(trained, torch.cat(moved), w)
        self.t += 1

    def state(self, trained: Tensor) -> dict[str, Tensor]:
        """What the bases keep of the tensors that take part; all of them have stepped at the first step."""
        names = [name for name in ("buffer", "first", "second") if name in self.bases[0].state]
        return {name: torch.cat([base.state[name] for base in self.bases])[trained] for name in names}

    def drawn(self, there: Tensor, frozen: bool) -> dict:
        """What the method draws anew at every step, over all that may move, also what nobody uses."""
        movable = [True, True, not frozen, not frozen, True, True]
        if self.method == "ESAM":
            kept = Masked(self.hyper["beta"]).kept(self.t, movable) if self.hyper["beta"] < 1 else [True] * 6
            return {"kept": [k for k, t in zip(kept, there, strict=False) if t]}
        if self.method == "RWSAMProbe":
            shapes = [(2, 2), (2,)] * 3
            probe = steppe.FiniteDifference()
            zeros = [
                torch.zeros(s, dtype=torch.float64) if may else None for s, may in zip(shapes, movable, strict=True)
            ]
            z = probe.direction(steppe.Vector(zeros), self.t).tensors
            d = sum(t.numel() for t in z if t is not None)
            used = [t.flatten() for t, here in zip(z, there, strict=False) if here]
            return {"z": torch.cat(used), "delta": probe.length * 0.1 / d**0.5}
        return {}


@pytest.mark.parametrize(
    ("case", "base"),
    [
        (case, base)
        for case in filter(in_reference, METHODS + MICRO + PARALLEL)
        for base in FLAT_BASES
        if (base == "momentum" or case in METHODS) and (case.name, base) != ("PreconditionedSAM", "momentum")
    ],
    ids=lambda v: getattr(v, "name", v),
)
@pytest.mark.filterwarnings("ignore:a gradient is not finite", "ignore:micro-batches of m=. run in a loop")
@pytest.mark.usefixtures("rehearsed_once")
def test_many_steps_against_the_reference(case: Case, base: str) -> None:
    draw = random.Random(f"{case.name} {base}")
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    p = Program(replace(case, make=OWN.get(case.name, case.make)), base, least_squares)
    flat = Flat(case, base, torch.cat([t.detach().flatten() for t in p.used()]))
    idle = [t.detach().clone() for t in p.idle()]
    exact, shared = case.name in EXACT, case.name in EXACT or case in PARALLEL
    ways, rate = p.ways(), Rate(FLAT_BASES[base]().lr)
    never = ("left out",) * shared + ("raise_at",) * exact  # a model that does so is refused, or shares no passes again
    never += ("spoil_at",) * (case.name == "ESAM")  # a mask of tensors without gradient spoils the choice alone
    for step in steps_of(p, never):
        x = torch.randn(N, 4, generator=g, dtype=torch.float64)
        y = torch.randn(N, 2, generator=g, dtype=torch.float64)
        event = draw_event(draw, p, rate, never) if step else "none"  # all memories begin with the first step
        p.leave_out(event)
        way, scaled, k = draw.choice(ways), draw.random() < 0.3, draw.randint(1, 3)
        if event.endswith("_at") and shared:
            way = "batch"
            p.rehearse(x, y)
        with p.unlucky(event, 1 if case.selects else k):  # a later forward of ESAM may only choose
            what = p.step(way, x, y, scaled)
        if what == "taken":
            flat.step(x, y, p.world, event != "left out", p.frozen, rate.now)
        else:
            assert event.endswith("_at")
        now = torch.cat([t.detach().flatten() for t in p.used()])
        torch.testing.assert_close(now, flat.w, rtol=0, atol=1e-9)
    assert same_bits(idle, p.idle())
    assert all(t not in p.opt.state for t in p.idle())
    assert p.opt.telemetry.steps == flat.t
    assert p.seen["taken"] > 0
    assert p.seen["skipped"] > 0 or "spoil_at" in never
    assert p.seen["raised"] > 0 or "raise_at" in never


# ------------------------------------------------------------------------------------------------------ against a twin


def chance(over_batch: bool) -> World:
    """Dropout and, in one branch, normalisation, over the batch where that is never a single example."""
    torch.manual_seed(3)
    x, y = torch.randn(3 * N, 4), torch.randint(3, (3 * N,))

    def branches() -> list[nn.Module]:
        first = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 3))
        norm = nn.BatchNorm1d(5) if over_batch else nn.LayerNorm(5)
        return [first, nn.Sequential(nn.Linear(4, 5), norm, nn.Linear(5, 3))]

    return World(unlucky(branches()), x[:N], y[:N], x, y)


AWAY = "MomentumSAM"  # its one pass is at w + eps, also that of a step that is skipped
IN_PARTS = ("m-SAM", "m-WSAM", "m-ESAM", "m-FSAM", "m-LookSAM", "m-RWSAM", "m-AESAM")  # one of each kind
TWINS = [c for c in METHODS + MICRO + COMBINATIONS if c.name != AWAY and (c not in MICRO or c.name in IN_PARTS)]


@pytest.mark.parametrize("case", TWINS, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:a gradient is not finite", "ignore:micro-batches of m=. run in a loop")
@pytest.mark.usefixtures("rehearsed_once")
def test_a_twin_that_takes_the_good_steps_alone(case: Case) -> None:
    """Bit for bit: weights, buffers, states and random numbers. The twin is an optimizer of ordinary steps."""
    draw = random.Random(case.name)
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    p, twin = (Program(case, "adamw", lambda: chance(not case.selects)) for _ in range(2))
    ways, rate = p.ways(), Rate(1e-2)
    if case.name == "NSAM":  # in two calls, the larger batch draws its random numbers last
        ways.remove("two calls")
    for _ in steps_of(p):
        x, y = torch.randn(N, 4, generator=g), torch.randint(3, (N,), generator=g)
        event = draw_event(draw, p, rate)
        way, scaled, k = draw.choice(ways), draw.random() < 0.3, draw.randint(1, 3)
        twin.freeze(p.frozen)
        twin.set_lr(rate.now)
        p.leave_out(event)
        twin.leave_out(event)
        for opt in (p.opt, twin.opt):  # where passes are shared, a scaled loss is not the same bits
            opt._stepper.parallel = False
        start = torch.get_rng_state()
        with p.unlucky(event, 1 if case.selects else k):  # a later forward of ESAM may only choose
            what = p.step(way, x, y, scaled)
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        if what == "taken":
            assert twin.step({"backward": "batch", "two calls": "closure"}.get(way, way), x, y) == "taken"
            assert torch.equal(torch.get_rng_state(), end)
        else:
            follow(p, twin, x, one_pass=way != "list" and case in METHODS and case.name != "NSAM", end=end)
        torch.set_rng_state(end)
        assert same_bits(p.world.parameters(), twin.world.parameters())
        assert same_bits(floating(p.model), floating(twin.model))
        assert_equal_states(p.opt.state_dict(), twin.opt.state_dict())
    assert min(p.seen.values()) > 0


def floating(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def follow(p: Program, twin: Program, x: Tensor, one_pass: bool, end: Tensor) -> None:
    """After a step that was not taken: statistics and random numbers as after one ordinary forward, or untouched."""
    before = [b.clone() for b in floating(twin.model)]
    if one_pass:
        with torch.no_grad():
            twin.model(x)
        assert torch.equal(torch.get_rng_state(), end)
        now = floating(p.model)
        assert same_bits(now, floating(twin.model)) or same_bits(now, before)
    twin.model.load_state_dict(p.model.state_dict())


# ------------------------------------------------------------------------------------------------------ what is left


@pytest.fixture
def few_objects():
    """Hide the objects of the libraries from the count."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("case", METHODS, ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:a gradient is not finite", "ignore:micro-batches of m=. run in a loop")
@pytest.mark.usefixtures("rehearsed_once", "few_objects")
def test_nothing_grows(case: Case) -> None:
    """As many tensors after many steps of every kind as after few."""
    p = Program(case, "adamw", lambda: chance(False))
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    counts = []
    for _ in range(3):
        for k in range(3 * LONGER):
            for way in p.ways():
                with p.unlucky(("none", "raise_at", "spoil_at")[k % 3], 1 + k % 2):
                    p.step(way, x, y, scaled=True)
        p.opt.zero_grad()
        gc.collect()
        counts.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
    assert counts[2] <= counts[1]


def problems() -> dict[str, Program]:
    return {case.name: Program(case, "adamw", lambda: chance(False)) for case in METHODS + COMBINATIONS}


def train(path: str, steps: int, done_with: Callable[[int], None]) -> None:
    """Goes on from the checkpoint that is there; one more after every step."""
    programs, done = problems(), 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        done = saved["done"]
        torch.set_rng_state(saved["random"])
        for name, p in programs.items():
            p.model.load_state_dict(saved["models"][name])
            p.opt.load_state_dict(saved["optimizers"][name])
    for step in range(done, steps):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(N, 4, generator=g), torch.randint(3, (N,), generator=g)
        for p in programs.values():
            p.step(p.ways()[step % len(p.ways())], x, y)
        state = {
            "done": step + 1,
            "random": torch.get_rng_state(),
            "models": {name: p.model.state_dict() for name, p in programs.items()},
            "optimizers": {name: p.opt.state_dict() for name, p in programs.items()},
        }
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)
        done_with(step)


def live(path: str, steps: int, pipe: Connection | None = None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    train(path, steps, pipe.send if pipe else lambda step: None)


def test_killed_at_any_moment_and_resumed(tmp_path) -> None:
    """Three lives and one, bit for bit."""
    steps, draw = 6 * LONGER, random.Random(0)
    live(str(tmp_path / "one"), steps)
    for life, last in enumerate((steps // 3, 2 * steps // 3, steps)):
        here, there = multiprocessing.Pipe()
        process = processes().Process(target=live, args=(str(tmp_path / "many"), steps, there))
        process.start()
        there.close()
        while here.recv() < (last - 1 if life == 2 else last):
            pass
        if life < 2:
            time.sleep(draw.random() * 0.05)  # at any moment of the next step
            process.kill()
        process.join()
        assert process.exitcode == (0 if life == 2 else -signal.SIGKILL)
    one, many = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "many"))
    for name in one["models"]:
        assert same_bits(list(one["models"][name].values()), list(many["models"][name].values())), name
        assert_equal_states(one["optimizers"][name], many["optimizers"][name])
