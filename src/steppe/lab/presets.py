"""The defaults of the commands for each data source: settings, methods and seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.lab import data, models, spec, tasks
from steppe.lab.errors import LabError
from steppe.lab.runs import Plan
from steppe.lab.settings import Settings


@dataclass(frozen=True)
class Preset:
    """Settings, and the methods and seeds that ``steppe compare`` compares under them."""

    settings: Settings
    methods: tuple[str, ...]
    seeds: int
    whole: bool = False  # train on all examples that the data have


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


def preset(name: str, quick: bool = False) -> Preset:
    """Return the defaults for a data source, the tiny ones if ``quick``.

    Raises:
        LabError: the source is unknown, or has no tiny version.
    """
    if name not in PRESETS and ":" not in name:
        known = ", ".join(sorted(PRESETS))
        raise LabError(f"unknown data {name!r}; choose from {known} or your own module:function")
    if quick and name not in QUICK:
        raise LabError(f"--quick is for {' and '.join(QUICK)}, not {name}")
    if name not in PRESETS:
        return replace(_OWN, settings=replace(_OWN.settings, data=name))
    return (QUICK if quick else PRESETS)[name]


def settings_for(chosen: Preset, given: Mapping[str, Any]) -> Settings:
    """Return a preset's settings, replaced by those values of ``given`` that are not ``None``.

    Raises:
        LabError: a value that no run can use, or data that cannot be read.
    """
    changes = {key: value for key, value in given.items() if value is not None}
    if "data_dir" in changes:
        changes["data_dir"] = str(Path(changes["data_dir"]).expanduser().resolve())
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
