"""Every method beside every base against an independent flat-tensor implementation."""

import pytest
import torch
from torch import nn

import steppe
from steppe import Masked, Reweighted, Rule, Sharpest, SharpnessAware
from steppe.rule import micro
from tests import reference
from tests.cases import N, World, world
from tests.exact import ExactNorms
from tests.reference import Base, PerStep, Problem, flat

STEPS = 5
RHO = 0.3

BASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1), Base("sgd", 0.1)),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.02),
        Base("momentum", 0.05, weight_decay=0.02),
    ),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), Base("adam", 0.01)),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), Base("adamw", 0.01, weight_decay=0.1)),
    "rmsprop": (lambda p: torch.optim.RMSprop(p, lr=0.01), Base("rmsprop", 0.01)),
}

METHODS = {
    "SAM": {},
    "USAM": {},
    "UnifiedSAM": {"lam": 0.3},
    "ASAM": {"eta": 0.05},
    "FisherSAM": {"eta": 2.0},
    "GSAM": {"alpha": 0.4},
    "WSAM": {"gamma": 0.8},
    "CoupledWSAM": {"gamma": 0.8},
    "NSAM": {},
    "LookSAM": {"k": 2, "alpha": 0.7},
    "FSAM": {"sigma": 0.8, "decay": 0.6},
    "VaSSO": {"theta": 0.4},
}


def problems(w: World) -> list[Problem]:
    loss = nn.CrossEntropyLoss(reduction="none")
    full = (w.full_x, w.full_y)
    return [Problem.from_module(w.model, loss, batch.data, full) for batch in w.batches(STEPS)]


def assert_same_path(opt: SharpnessAware, w: World, expected: list[torch.Tensor]) -> None:
    for batch, point in zip(w.batches(STEPS), expected, strict=True):
        opt.step(batch)
        torch.testing.assert_close(flat(w.model), point, rtol=0, atol=1e-9)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [None, 1, 3, N])
@pytest.mark.parametrize("name", METHODS)
def test_against_the_reference(name: str, m: int | None, base: str) -> None:
    w, hyper = world(), METHODS[name]
    torch_base, flat_base = BASES[base]
    expected = reference.trajectory(name, problems(w), flat(w.model), flat_base, STEPS, m, rho=RHO, **hyper)
    more = {"full": w.full} if name == "NSAM" else {}
    assert_same_path(getattr(steppe, name)(torch_base(w.parameters()), rho=RHO, m=m, **hyper, **more), w, expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [None, 3])
def test_rw_sam_with_exact_norms(m: int | None, base: str) -> None:
    w = world()
    torch_base, flat_base = BASES[base]
    expected = reference.trajectory("RWSAM", problems(w), flat(w.model), flat_base, STEPS, m, rho=RHO, lam=2.0)
    by_hand = micro(m, Rule(sample=Reweighted(2.0, ExactNorms())))
    assert_same_path(SharpnessAware(torch_base(w.parameters()), by_hand, RHO), w, expected)
    again = world()
    factored = steppe.RWSAM(torch_base(again.parameters()), RHO, lam=2.0, m=m, parallel=True)
    assert_same_path(factored, again, expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [None, 3])
def test_rw_sam_with_the_probe(m: int | None, base: str) -> None:
    w = world()
    torch_base, flat_base = BASES[base]
    opt = steppe.RWSAM(torch_base(w.parameters()), RHO, lam=2.0, m=m, parallel=False)
    probe, d = steppe.FiniteDifference(), len(flat(w.model))
    vector = steppe.Vector([p.detach() for p in w.parameters()])
    z = PerStep(torch.cat([t.reshape(-1) for t in probe.direction(vector, k).tensors]) for k in range(STEPS))
    delta = probe.length * RHO / d**0.5
    expected = reference.trajectory(
        "RWSAMProbe", problems(w), flat(w.model), flat_base, STEPS, m, rho=RHO, lam=2.0, z=z, delta=delta
    )
    assert_same_path(opt, w, expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [None, 5])
def test_esam(m: int | None, base: str) -> None:
    w = world()
    torch_base, flat_base = BASES[base]
    masks = Masked(0.5)
    kept = PerStep(masks.kept(k, [True] * len(w.parameters())) for k in range(STEPS))
    expected = reference.trajectory(
        "ESAM", problems(w), flat(w.model), flat_base, STEPS, m, rho=RHO, beta=0.5, gamma=0.5, kept=kept
    )
    assert_same_path(steppe.ESAM(torch_base(w.parameters()), RHO, 0.5, 0.5, m=m), w, expected)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "NSAM"])
def test_a_rho_for_every_group(name: str) -> None:
    w, hyper = world(), METHODS[name]
    rhos = [0.0, 0.2, RHO, RHO, 0.5, 0.0]
    assert len(rhos) == len(w.parameters())
    expected = reference.trajectory(
        name, problems(w), flat(w.model), BASES["momentum"][1], STEPS, None, rho_of=rhos, **hyper
    )
    groups = [{"params": [p], "rho": r} for p, r in zip(w.parameters(), rhos, strict=True)]
    for group in groups[2:4]:
        del group["rho"]  # the optimizer's
    base = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.02)
    assert_same_path(getattr(steppe, name)(base, rho=RHO, **hyper), w, expected)


def test_masks_keep_a_share_and_change_with_step_and_seed() -> None:
    all_may = [True] * 50
    kept = [Masked(0.3).kept(k, all_may) for k in range(200)]
    share = sum(map(sum, kept)) / (200 * 50)
    assert share == pytest.approx(0.3, abs=0.02)
    assert kept[0] != kept[1]
    assert kept[0] != Masked(0.3, seed=1).kept(0, all_may)
    assert kept[0] == Masked(0.3).kept(0, all_may)
    for k in range(20):  # never none of those that may
        assert Masked(1e-9).kept(k, [False, True, False]) == [False, True, False]
        assert Masked(1.0).kept(k, [True, False]) == [True, False]


def test_the_sharpest_are_those_whose_loss_rises_most() -> None:
    w = world()
    chosen = []

    class Watched:
        per_example = True

        def __call__(self, f):
            index = Sharpest(0.35)(f)
            rise = f.losses() - f.losses_at_w()
            chosen.append((index, rise))
            return index

    SharpnessAware(torch.optim.SGD(w.parameters(), lr=0.1), Rule(select=Watched()), 0.5).step(w.batch)
    index, rise = chosen[0]
    assert sorted(index.tolist()) == sorted(rise.argsort(descending=True)[:3].tolist())
    assert rise.abs().max() > 1e-3
