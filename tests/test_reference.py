"""Every method beside every base against an independent flat-tensor implementation."""

import pytest
import torch
from torch import nn

import steppe
from steppe import BothWeighted, EffectiveSize, Masked, Reweighted, Rule, Sharpest, SharpnessAware, Softmax
from steppe.rule import on_micro_batches
from tests import reference
from tests.cases import BASES, World, sgd, world
from tests.exact import ExactNorms
from tests.reference import Base, PerStep, Problem, flat

STEPS = 5
RHO = 0.3

FLAT_BASES = {  # the same recipes as BASES
    "sgd": Base("sgd", 0.1),
    "momentum": Base("momentum", 0.05, weight_decay=1e-2),
    "adam": Base("adam", 1e-2),
    "adamw": Base("adamw", 1e-2, weight_decay=0.1),
    "rmsprop": Base("rmsprop", 1e-2),
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
    "LESAM": {"sigma": 0.1},
    "XSAM": {"alpha": 1.6},
    "SSAM": {},
    "SANER": {"alpha": 0.4},
    "LightSAM": {},
    "GAM": {"alpha": 0.7},
    "ZSharp": {"q": 0.6},
    "GCSAM": {},
    "LookbehindSAM": {"k": 3, "alpha": 0.3},
}
READING = {"MomentumSAM": ("momentum", "adam", "adamw"), "PreconditionedSAM": ("adam", "adamw", "rmsprop")}


def problems(w: World) -> list[Problem]:
    loss = nn.CrossEntropyLoss(reduction="none")
    full = (w.full_x, w.full_y)
    return [Problem.from_module(w.model, loss, batch.data, full) for batch in w.batches(STEPS)]


def assert_same_path(opt: SharpnessAware, w: World, expected: list[torch.Tensor]) -> None:
    for batch, point in zip(w.batches(STEPS), expected, strict=True):
        opt.step(batch)
        torch.testing.assert_close(flat(w.model), point, rtol=0, atol=1e-9)


def expected_path(name: str, w: World, base: str, rho=RHO, m: int | None = None, **hyper) -> list[torch.Tensor]:
    return reference.trajectory(name, problems(w), flat(w.model), FLAT_BASES[base], rho, m, **hyper)


@pytest.mark.parametrize(("m", "base"), [*((None, base) for base in BASES), (1, "momentum"), (3, "momentum")])
@pytest.mark.parametrize("name", METHODS)
def test_against_the_reference(name: str, m: int | None, base: str) -> None:
    w, hyper = world(), METHODS[name]
    expected = expected_path(name, w, base, m=m, **hyper)
    more = {"full": w.full} if name == "NSAM" else {}
    assert_same_path(getattr(steppe, name)(BASES[base](w.parameters()), rho=RHO, m=m, **hyper, **more), w, expected)


@pytest.mark.parametrize(("name", "base"), [(name, base) for name, bases in READING.items() for base in bases])
@pytest.mark.parametrize("m", [None, 3])
def test_methods_that_read_the_bases_state(name: str, base: str, m: int | None) -> None:
    w = world()
    expected = expected_path(name, w, base, m=m)
    assert_same_path(getattr(steppe, name)(BASES[base](w.parameters()), rho=RHO, m=m), w, expected)


@pytest.mark.parametrize("base", BASES)
def test_wsam_with_its_authors_clipping(base: str) -> None:
    w, hyper = world(), {"gamma": 0.8, "clip_each": 0.5}
    expected = expected_path("WSAMClip", w, base, **hyper)
    assert_same_path(steppe.WSAM(BASES[base](w.parameters()), RHO, **hyper), w, expected)


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_lookbehind_with_a_share_for_every_tensor(base: str) -> None:
    w = world()
    expected = expected_path("LookbehindSAM", w, base, k=2, alpha=None)
    assert_same_path(steppe.LookbehindSAM(BASES[base](w.parameters()), RHO, k=2, alpha=None), w, expected)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.7, -1.0), (9.0, 9.0)])
@pytest.mark.parametrize("base", BASES)
def test_ae_sam(base: str, start: float, end: float) -> None:
    w, hyper = world(), {"start": start, "end": end, "steps": 3, "decay": 0.7}
    expected = expected_path("AESAM", w, base, **hyper)
    opt = steppe.AESAM(BASES[base](w.parameters()), RHO, **hyper)
    assert_same_path(opt, w, expected)
    assert opt.param_groups[0]["sharpness.mu"] > 0


@pytest.mark.parametrize(("m", "base"), [(None, "momentum"), (3, "momentum"), (None, "adamw"), (3, "adamw")])
def test_rw_sam_with_exact_norms(m: int | None, base: str) -> None:
    w, again = world(), world()
    expected = expected_path("RWSAM", w, base, m=m, lam=2.0)
    by_hand = on_micro_batches(Rule(sample=Reweighted(2.0, ExactNorms())), m)
    assert_same_path(SharpnessAware(BASES[base](w.parameters()), by_hand, RHO), w, expected)
    factored = steppe.RWSAM(BASES[base](again.parameters()), RHO, lam=2.0, m=m, parallel=True)
    assert_same_path(factored, again, expected)


@pytest.mark.parametrize(("m", "base"), [(None, "momentum"), (3, "momentum"), (None, "adamw"), (3, "adamw")])
def test_rw_sam_with_the_probe(m: int | None, base: str) -> None:
    w = world()
    opt = steppe.RWSAM(BASES[base](w.parameters()), RHO, lam=2.0, m=m, parallel=False)
    probe, d = steppe.FiniteDifference(), len(flat(w.model))
    vector = steppe.Vector([p.detach() for p in w.parameters()])
    z = PerStep(torch.cat([t.reshape(-1) for t in probe.direction(vector, k).tensors]) for k in range(STEPS))
    expected = expected_path("RWSAMProbe", w, base, m=m, lam=2.0, z=z, delta=probe.length * RHO / d**0.5)
    assert_same_path(opt, w, expected)


@pytest.mark.parametrize("hyper", [{"size": 2.5}, {"lam": 2.0}], ids=str)
@pytest.mark.parametrize(("m", "base"), [(None, "momentum"), (4, "momentum"), (None, "adamw")])
def test_reweighted_sharpness(m: int | None, base: str, hyper: dict) -> None:
    w, again = world(), world()
    expected = expected_path("ReweightedSharpness", w, base, m=m, **hyper)
    weights = EffectiveSize(2.5, ExactNorms()) if "size" in hyper else Softmax(2.0, ExactNorms())
    assert_same_path(
        SharpnessAware(BASES[base](w.parameters()), on_micro_batches(BothWeighted(weights), m), RHO), w, expected
    )
    factored = steppe.ReweightedSharpness(BASES[base](again.parameters()), RHO, m=m, **hyper)
    assert_same_path(factored, again, expected)


@pytest.mark.parametrize(("m", "base"), [(None, "momentum"), (5, "momentum"), (None, "adamw"), (5, "adamw")])
def test_esam(m: int | None, base: str) -> None:
    w = world()
    kept = PerStep(Masked(0.5).kept(k, [True] * len(w.parameters())) for k in range(STEPS))
    expected = expected_path("ESAM", w, base, m=m, beta=0.5, gamma=0.5, kept=kept)
    assert_same_path(steppe.ESAM(BASES[base](w.parameters()), RHO, 0.5, 0.5, m=m), w, expected)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "NSAM"])
def test_a_rho_for_every_group(name: str) -> None:
    w, hyper = world(), METHODS[name]
    rhos = [0.0, 0.2, RHO, RHO, 0.5, 0.0]
    assert len(rhos) == len(w.parameters())
    expected = expected_path(name, w, "momentum", rhos, **hyper)
    groups = [{"params": [p], "rho": r} for p, r in zip(w.parameters(), rhos, strict=True)]
    for group in groups[2:4]:
        del group["rho"]  # the optimizer's
    assert_same_path(getattr(steppe, name)(BASES["momentum"](groups), rho=RHO, **hyper), w, expected)


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

    SharpnessAware(sgd(w), Rule(select=Watched()), 0.5).step(w.batch)
    index, rise = chosen[0]
    assert sorted(index.tolist()) == sorted(rise.argsort(descending=True)[:3].tolist())
    assert rise.abs().max() > 1e-3
