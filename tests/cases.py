"""One table: every method and many combinations of pieces, with what is known of each.

A row must pass every common property in ``test_common.py``. ``make(base, world, rho)`` builds the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

import steppe
from steppe import (
    Adaptive,
    BothWeighted,
    ByClass,
    Coupled,
    Eigen,
    EigenCorrected,
    Euclidean,
    Every,
    Everything,
    Fisher,
    Friendly,
    Masked,
    Micro,
    OnFull,
    Reweighted,
    Rule,
    Scaled,
    Sharpest,
    SharpnessAware,
    Smoothed,
    Stale,
    Subset,
    SurrogateGap,
    Unified,
    Unnormalised,
    Weighted,
)
from tests.models import mlp

N = 10  # examples in a batch: no multiple of 4


@dataclass
class World:
    """A small problem: a model, one batch, and n-SAM's larger one."""

    model: nn.Module
    x: Tensor
    y: Tensor
    full_x: Tensor
    full_y: Tensor
    criterion: nn.Module = field(default_factory=lambda: nn.CrossEntropyLoss(reduction="none"))

    @property
    def batch(self) -> steppe.Batch:
        return steppe.Batch.supervised(self.model, self.criterion, self.x, self.y)

    @property
    def full(self) -> steppe.Batch:
        return steppe.Batch.supervised(self.model, self.criterion, self.full_x, self.full_y)

    def batches(self, steps: int) -> list[steppe.Batch]:
        """A different batch at every step."""
        g = torch.Generator().manual_seed(5)
        made = []
        for _ in range(steps):
            x = torch.randn(N, 5, generator=g, dtype=self.x.dtype)
            made.append(steppe.Batch.supervised(self.model, self.criterion, x, torch.randint(3, (N,), generator=g)))
        return made

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def world(dtype: torch.dtype = torch.float64, model: Callable[[], nn.Module] = mlp, seed: int = 0) -> World:
    torch.manual_seed(9)
    x, full_x = torch.randn(N, 5, dtype=dtype), torch.randn(3 * N, 5, dtype=dtype)
    y, full_y = torch.randint(3, (N,)), torch.randint(3, (3 * N,))
    torch.manual_seed(seed)  # of the model
    return World(model().to(dtype), x, y, full_x, full_y)


Make = Callable[[torch.optim.Optimizer, World, float], SharpnessAware]


@dataclass(frozen=True)
class Case:
    """A row.

    ``passes``: forwards and backwards of the first step, in whole batches of N. ``looks_inside``: needs a Batch.
    ``rho_zero_is_base``: also for its rule run at rho = 0, without the shortcut. ``low``: works in bfloat16.
    """

    name: str
    make: Make
    passes: tuple[float, float] = (2, 2)
    looks_inside: bool = False
    low: bool = True
    selects: bool = False  # its second gradient is on a part of the batch
    waits: int = 0  # for the device, beside those of every step


def named(method: type[SharpnessAware], **hyper: object) -> Make:
    if method is steppe.NSAM:
        return lambda base, world, rho: method(base, rho=rho, full=world.full, **hyper)
    return lambda base, world, rho: method(base, rho=rho, **hyper)


def composed(rule: Callable[..., object]) -> Make:
    return lambda base, world, rho: SharpnessAware(base, rule, rho=rho, full=world.full, parallel=False)


class Keeps:
    """Keeps the moments of the gradients in a base's state, which it does not use."""

    def step(self, closure: None = None) -> None:
        super().step()  # first: it looks for its own state
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, g = self.state[p], p.grad.detach()
            for name, t in (("exp_avg", g), ("exp_avg_sq", g * g)):
                state[name] = state[name].lerp(t, 0.1) if name in state else 0.1 * t

    step.hooked = True  # so torch runs the hooks of a step once, in the step above, whoever was made before


class KeepingSGD(Keeps, torch.optim.SGD):
    pass


class KeepingRMSprop(Keeps, torch.optim.RMSprop):
    pass


def reading(method: type[SharpnessAware], **hyper: object) -> Make:
    """Make a method that reads the base's moments, which SGD and RMSprop do not keep."""
    keeping = {torch.optim.SGD: KeepingSGD, torch.optim.RMSprop: KeepingRMSprop}

    def make(base: torch.optim.Optimizer, world: World, rho: float) -> SharpnessAware:
        base.__class__ = keeping.get(type(base), type(base))
        return method(base, rho=rho, **hyper)

    return make


METHODS = [
    Case("SAM", named(steppe.SAM)),
    Case("USAM", named(steppe.USAM)),
    Case("UnifiedSAM", named(steppe.UnifiedSAM, lam=0.3)),
    Case("ASAM", named(steppe.ASAM)),
    Case("FisherSAM", named(steppe.FisherSAM)),
    Case("GSAM", named(steppe.GSAM)),
    Case("ESAM", named(steppe.ESAM), passes=(2.5, 1.5), looks_inside=True, selects=True),
    Case("ESAM-all", named(steppe.ESAM, gamma=1.0)),
    Case("WSAM", named(steppe.WSAM)),
    Case("CoupledWSAM", named(steppe.CoupledWSAM)),
    Case("NSAM", named(steppe.NSAM)),
    Case("RWSAM", named(steppe.RWSAM), looks_inside=True),
    Case("RWSAM probe", named(steppe.RWSAM, parallel=False), passes=(3, 2), looks_inside=True, low=False),
    Case("ReweightedSharpness", named(steppe.ReweightedSharpness, size=4), looks_inside=True),
    Case(
        "ReweightedSharpness probe",
        named(steppe.ReweightedSharpness, lam=0.5, parallel=False),
        passes=(4, 3),
        looks_inside=True,
        low=False,
    ),
    Case("LookSAM", named(steppe.LookSAM, k=2)),
    Case("FSAM", named(steppe.FSAM, sigma=0.7)),
    Case("VaSSO", named(steppe.VaSSO, theta=0.4)),
    Case("WSAM clip", named(steppe.WSAM, clip_each=50.0)),
    Case("MomentumSAM", reading(steppe.MomentumSAM), passes=(1, 1)),
    Case("LESAM", named(steppe.LESAM, sigma=0.05)),
    Case("XSAM", named(steppe.XSAM, every=2), passes=(23, 2), looks_inside=True),
    Case("XSAM fixed", named(steppe.XSAM, alpha=1.5)),
    Case("SSAM", named(steppe.SSAM)),
    Case("SANER", named(steppe.SANER, alpha=0.7)),
    Case("LightSAM", named(steppe.LightSAM), waits=1),
    Case("GAM", named(steppe.GAM, alpha=0.6), passes=(4, 4)),
    Case("ZSharp", named(steppe.ZSharp, q=0.6)),
    Case("GCSAM", named(steppe.GCSAM)),
    Case("AESAM", named(steppe.AESAM, start=0.5, end=-1.0, steps=4), waits=1),
    Case("FunctionalSAM", named(steppe.FunctionalSAM), looks_inside=True),
    Case("PreconditionedSAM", reading(steppe.PreconditionedSAM)),
    Case("EigenSAM", named(steppe.EigenSAM, every=2, power=2), passes=(6, 6), low=False),
    Case("LookbehindSAM", named(steppe.LookbehindSAM), passes=(3, 3)),
]

MICRO = [
    Case("m-" + name, named(getattr(steppe, name), m=4, parallel=False, **hyper), looks_inside=True, **known)
    for name, hyper, known in [
        ("SAM", {}, {}),
        ("USAM", {}, {}),
        ("UnifiedSAM", {}, {}),
        ("ASAM", {}, {}),
        ("FisherSAM", {}, {}),
        ("GSAM", {}, {}),
        ("ESAM", {"beta": 1.0}, {"passes": (2.5, 1.5), "selects": True}),
        ("WSAM", {}, {}),
        ("CoupledWSAM", {}, {}),
        ("NSAM", {}, {}),
        ("RWSAM", {}, {"passes": (3, 2), "low": False}),
        ("ReweightedSharpness", {"size": 2}, {"passes": (4, 3), "low": False}),
        ("LookSAM", {"k": 2}, {}),
        ("FSAM", {}, {}),
        ("VaSSO", {}, {}),
        ("GCSAM", {}, {}),
        ("AESAM", {}, {"passes": (3, 3), "waits": 1}),
        ("FunctionalSAM", {}, {}),
        ("LookbehindSAM", {}, {"passes": (3, 3)}),
        ("SANER", {}, {}),
        ("LightSAM", {}, {"waits": 1}),
    ]
]

PARALLEL = [
    Case(f"parallel m-{name}", named(getattr(steppe, name), m=4, parallel=True), looks_inside=True)
    for name in ("SAM", "USAM", "WSAM", "CoupledWSAM", "RWSAM")
]

COMBINATIONS = [
    Case(
        "RW+ASAM+WSAM on micro-batches",
        composed(Micro(4, Rule(Reweighted(0.5), Adaptive(0.01), combine=Weighted(0.9)))),
        passes=(4, 3),
        looks_inside=True,
        low=False,
    ),
    Case(
        "masked Fisher, sharpest, coupled",
        composed(Rule(Masked(0.5), Fisher(), steppe.Sharpest(0.5), Coupled(0.7))),
        passes=(3.5, 2.5),
        looks_inside=True,
        selects=True,
    ),
    Case(
        "friendly of smoothed, USAM, GSAM",
        composed(Rule(Friendly(0.5, of=Smoothed(0.5)), Unnormalised(), combine=SurrogateGap(0.2))),
    ),
    Case("n-ASAM, weighted", composed(Rule(OnFull(), Adaptive(on=Everything()), combine=Weighted(0.5))), passes=(3, 3)),
    Case(
        "n-SAM, sharpest",
        composed(Rule(OnFull(), select=Sharpest(0.5))),
        passes=(3.5, 1.5),
        looks_inside=True,
        selects=True,
    ),
    Case("every second step", composed(Every(2, Rule(geometry=Scaled(0.5, of=Unified(0.2)))))),
    Case("sampled m-SAM", composed(Micro(2, Rule(), sampled=2)), passes=(1.8, 1.8), looks_inside=True),
    Case(
        "sampled m-SAM in the pass of g",
        lambda base, world, rho: steppe.SAM(base, rho, m=2, sampled=2, clip=0.9),
        passes=(1.4, 1.4),
        looks_inside=True,
    ),
    Case(
        "sampled m-ASAM, weighted",
        composed(Micro(5, Rule(geometry=Adaptive(), combine=Weighted(0.8)), sampled=1)),
        passes=(2, 2),
        looks_inside=True,
    ),
    Case("sampled ascent", composed(Rule(Subset(4))), passes=(1.4, 1.4), looks_inside=True),
    Case(
        "sampled ascent, masked friendly, ASAM, weighted",
        composed(Rule(Subset(2, Friendly(0.5, of=Masked(0.6))), Adaptive(), combine=Weighted(0.8))),
        passes=(2.2, 2.2),
        looks_inside=True,
    ),
    Case("AsyncSAM", composed(Rule(Stale()))),
    Case("sampled ascent, AsyncSAM", composed(Rule(Subset(4, Stale()))), passes=(1.4, 1.4), looks_inside=True),
    Case("Focal-SAM", composed(BothWeighted(ByClass((5, 3, 2)))), passes=(3, 3), looks_inside=True),
    Case("X-SAM", composed(Rule(combine=EigenCorrected(0.3, Eigen(every=2, power=2)))), passes=(6, 6), low=False),
    Case("micro of every", composed(Micro(5, Every(2, Rule(geometry=Euclidean())))), looks_inside=True),
]

CASES = METHODS + MICRO + PARALLEL + COMBINATIONS

BASES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: sgd(p),
    "momentum": lambda p: sgdm(p, lr=0.05, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
}

# methods whose step is more than a gradient at w and one at w + eps
MORE_THAN_TWO = {"ESAM-all", "AESAM", "EigenSAM", "GAM", "LookbehindSAM"}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_method = pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
each_base = pytest.mark.parametrize("base", BASES)
# A base sees a gradient, what moves beside it, and the rule's memory in its state; or its own state is read: one method
# of each kind beside every base. ``test_reference.py`` has every method beside every base.
SEEN_BY_BASES = ("SAM", "WSAM", "FSAM", "AESAM", "MomentumSAM")


def beside_bases(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrise a test by the cases, of which some stand beside every base."""
    rows = [(c, base) for c in cases for base in BASES if base == "momentum" or c.name in SEEN_BY_BASES]
    return pytest.mark.parametrize(("case", "base"), rows, ids=lambda v: getattr(v, "name", v))


each_case_and_base = beside_bases(CASES)


def sgd(of: object, lr: float = 0.1, **options: object) -> torch.optim.SGD:
    """Return SGD on a model's or world's parameters, or on parameters or groups themselves."""
    return torch.optim.SGD(of.parameters() if hasattr(of, "parameters") else of, lr=lr, **options)


def sgdm(of: object, lr: float = 0.1, **options: object) -> torch.optim.SGD:
    """Return SGD with momentum."""
    return sgd(of, lr, momentum=0.9, **options)


def scaler(scale: float = 1024.0, **options: object) -> torch.amp.GradScaler:
    """Return a scaler that does not grow while a test runs."""
    return torch.amp.GradScaler("cpu", init_scale=scale, **{"growth_interval": 10_000} | options)


def flat(model: object) -> Tensor:
    """Return a copy of all weights, in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def optimizer(case: Case, world: World, base: str = "momentum", rho: float = 0.1) -> SharpnessAware:
    return case.make(BASES[base](world.parameters()), world, rho)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Return whether they are equal bit for bit, also in the signs of zeros."""
    views = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    bits = lambda t: t.detach().contiguous().view(views[t.element_size()])  # noqa: E731
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def assert_equal_states(a: dict, b: dict) -> None:
    """Assert that the state dicts of two optimizers are equal, bit for bit."""
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["state"][key][name])), name


def assert_close(a: object, b: object, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Assert that two models or worlds have about the same weights."""
    torch.testing.assert_close([p.detach() for p in a.parameters()], list(b.parameters()), rtol=rtol, atol=atol)
