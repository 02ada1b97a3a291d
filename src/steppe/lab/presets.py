"""The defaults of the commands for each data source: settings, methods and seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.lab import data, models, spec, tasks
from steppe.lab.errors import LabError, unknown
from steppe.lab.fair import Asked
from steppe.lab.runs import Plan
from steppe.lab.settings import Settings


@dataclass(frozen=True)
class Preset:
    """Settings, and the methods and seeds that ``steppe compare`` compares under them."""

    settings: Settings
    methods: tuple[str, ...]
    seeds: int
    whole: bool = False  # train on all examples that the data have
    trials: int = 16  # of each method's search
    search_seeds: int = 2


ADAMW_LR = 1e-3  # a usual learning rate of AdamW; SGD's would be fifty times too large
_BASE = ("SGD", "SGD(epochs=2x)")
_NOISY = (*_BASE, "SAM(rho=0.2)", "SAM(rho=0.5)")
_DIGITS = (*_NOISY, "WSAM(rho=0.5, gamma=0.9)", *(f"SAM(rho=0.2, m={m})" for m in (64, 32, 16, 8)), "RWSAM(rho=0.5)")
_FASHION = (*_BASE, "SAM(rho=0.05)", "SAM(rho=0.1)", "SAM(rho=0.05, m=32)")
_PAPER = (*_BASE, "SAM(rho=0.1)", "WSAM(rho=0.1, gamma=0.9)")
_SMALL = ("SGD", "SAM(rho=0.05)")

_CLOTHES = Settings(data="fashion-mnist", train_size=2000, model="cnn-32", epochs=60)
_CIFAR = Settings("cifar10", None, 50_000, 0.0, "resnet18", epochs=200, weight_decay=1e-3)  # WSAM's, of its Table 5
_OWN = Preset(Settings("", None, 128, 0.0, epochs=50), (*_BASE, "SAM(rho=0.05)"), 3, whole=True)

PRESETS: dict[str, Preset] = {
    "digits": Preset(Settings(), _DIGITS, 5),
    "fashion-mnist": Preset(_CLOTHES, _FASHION, 3),
    "cifar10": Preset(_CIFAR, _PAPER, 3),
    "cifar100": Preset(replace(_CIFAR, data="cifar100"), _PAPER, 3),
}
QUICK: dict[str, Preset] = {
    "digits": Preset(Settings(model="mlp-128-128", train_size=600, epochs=80), (*_NOISY, "SAM(rho=0.2, m=8)"), 3),
    "fashion-mnist": Preset(replace(_CLOTHES, train_size=1000, model="cnn-16", epochs=10, lr=0.1), _SMALL, 2),
}


# of fair comparisons: what is not in a method's parentheses is searched
_SEARCHED = ("SAM", "WSAM", "SAM(m={m})", "SAM(m={m}, sampled=1)")
_LARGE = {"methods": ("SAM", "SAM(m={m}, sampled=1)"), "trials": 12, "search_seeds": 1}
FAIR: dict[str, Preset] = {
    "digits": Preset(Settings(model="mlp-128-128", epochs=60), _SEARCHED, 10, trials=20),
    **{name: replace(one, **_LARGE) for name, one in PRESETS.items() if name != "digits"},  # type: ignore[arg-type]
}
FAIR_QUICK: dict[str, Preset] = {
    "digits": Preset(Settings(model="mlp-64", train_size=600, epochs=12), ("SAM",), 3, trials=4, search_seeds=1),
    "fashion-mnist": replace(QUICK["fashion-mnist"], methods=("SAM",), trials=3, search_seeds=1),
}
_OWN_FAIR = replace(_OWN, methods=_SEARCHED, seeds=5)


def preset(name: str, quick: bool = False, fair: bool = False) -> Preset:
    """Return the defaults for a data source, the tiny ones if ``quick``, of a fair comparison if ``fair``.

    Raises:
        LabError: the source is unknown, or has no tiny version.
    """
    if name not in PRESETS and ":" not in name:
        raise unknown(f"unknown data {name!r}", name, [*PRESETS, "module:function"])
    if quick and name not in QUICK:
        raise LabError(f"--quick is for {' and '.join(QUICK)}, not {name}")
    if name not in PRESETS:
        own = _OWN_FAIR if fair else _OWN
        return replace(own, settings=replace(own.settings, data=name))
    return ((FAIR_QUICK if quick else FAIR) if fair else (QUICK if quick else PRESETS))[name]


def settings_for(chosen: Preset, given: Mapping[str, Any]) -> Settings:
    """Return a preset's settings, replaced by those values of ``given`` that are not ``None``.

    Raises:
        LabError: a value that no run can use, or data that cannot be read.
    """
    changes = {key: value for key, value in given.items() if value is not None}
    if "data_dir" in changes:
        changes["data_dir"] = str(Path(changes["data_dir"]).expanduser().resolve())
    if changes.get("optimizer") == "adamw":
        changes.setdefault("lr", ADAMW_LR)
    if chosen.whole and "train_size" not in changes:
        changes["train_size"] = tasks.offered(replace(chosen.settings, data_dir=changes.get("data_dir")))
    settings = replace(chosen.settings, **changes)
    if chosen.whole and data.read(settings).own is not None:
        if "model" in changes:
            raise LabError(f"{settings.data} brings its own model; leave --model out")
        settings = replace(settings, model=settings.data)
    return settings


def planned(
    source: str,
    given: Mapping[str, Any],
    methods: list[str] | None = None,
    baseline: str | None = None,
    seeds: int | None = None,
    quick: bool = False,
    first: int = 0,
) -> Plan:
    """Return a checked plan: a source's defaults, replaced by everything that is not ``None``.

    Raises:
        LabError: any of it cannot be trained; nothing has been written.
    """
    default = preset(source, quick)
    settings = settings_for(default, given)
    chosen = tuple(spec.parse_all(methods or list(default.methods), settings))
    models.check(settings.model)
    tasks.check(settings)
    reference = None if baseline is None else spec.parse(baseline)
    return Plan(settings, chosen, seeds or default.seeds, reference, first)


def asked(
    source: str,
    given: Mapping[str, Any],
    methods: list[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
    **options: Any,
) -> Asked:
    """Return a fair comparison: a source's defaults, replaced by everything that is not ``None``.

    ``options`` are fields of :class:`~steppe.lab.fair.Asked`. The digits have one test set for all seeds, because one
    seed's validation examples would be another's test examples.

    Raises:
        LabError: any of it cannot be trained; nothing has been written.
    """
    default = preset(source, quick, fair=True)
    settings = settings_for(default, given)
    if settings.data == "digits":
        settings = replace(settings, test_seed=0)
    models.check(settings.model)
    tasks.check(settings)
    usual: dict[str, Any] = {"trials": default.trials, "search_seeds": default.search_seeds}
    if held := data.read(settings).held:
        if options.get("validation") is not None:
            raise LabError(f"{settings.data} brings its own validation examples; leave --validation out")
        usual["validation"] = held / settings.train_size
    chosen = usual | {key: value for key, value in options.items() if value is not None}
    return Asked(settings, tuple(methods or default.methods), seeds or default.seeds, **chosen)
