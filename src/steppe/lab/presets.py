"""The defaults of the commands for each data source: settings, methods and seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steppe.lab import models, spec, tasks
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


_DIGITS = Settings()
_FASHION = Settings(data="fashion-mnist", train_size=2000, model="cnn-32", epochs=60)
_DIGITS_METHODS = (
    "SGD",
    "SGD(epochs=2x)",
    "SAM(rho=0.2)",
    "SAM(rho=0.5)",
    "WSAM(rho=0.5, gamma=0.9)",
    "SAM(rho=0.2, m=64)",
    "SAM(rho=0.2, m=32)",
    "SAM(rho=0.2, m=16)",
    "SAM(rho=0.2, m=8)",
    "RWSAM(rho=0.5)",
)
_QUICK_METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.2)", "SAM(rho=0.5)", "SAM(rho=0.2, m=8)")
_FASHION_METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.05)", "SAM(rho=0.1)", "SAM(rho=0.05, m=32)")
_FASHION_QUICK = replace(_FASHION, train_size=1000, model="cnn-16", epochs=10, lr=0.1)

_CIFAR = Settings("cifar10", None, 50_000, 0.0, "resnet18", epochs=200, weight_decay=1e-3)  # WSAM's, of its Table 5
_OWN = Settings("", None, 128, 0.0, epochs=50)
_PAPER_METHODS = ("SGD", "SGD(epochs=2x)", "SAM(rho=0.1)", "WSAM(rho=0.1, gamma=0.9)")

PRESETS: dict[tuple[str, bool], Preset] = {
    ("digits", False): Preset(_DIGITS, _DIGITS_METHODS, 5),
    ("digits", True): Preset(replace(_DIGITS, model="mlp-128-128", train_size=600, epochs=80), _QUICK_METHODS, 3),
    ("fashion-mnist", False): Preset(_FASHION, _FASHION_METHODS, 3),
    ("fashion-mnist", True): Preset(_FASHION_QUICK, ("SGD", "SAM(rho=0.05)"), 2),
    ("cifar10", False): Preset(_CIFAR, _PAPER_METHODS, 3),
    ("cifar100", False): Preset(replace(_CIFAR, data="cifar100"), _PAPER_METHODS, 3),
}


def preset(data: str, quick: bool = False) -> Preset:
    """Return the defaults for a data source, the tiny ones if ``quick``.

    Raises:
        LabError: the source is unknown, or has no tiny version.
    """
    if ":" in data and not quick:
        return Preset(replace(_OWN, data=data), ("SGD", "SGD(epochs=2x)", "SAM(rho=0.05)"), 3, whole=True)
    if (data, quick) in PRESETS:
        return PRESETS[data, quick]
    known = sorted({name for name, _ in PRESETS})
    if data in known or ":" in data:
        raise LabError(f"--quick is for {' and '.join(name for name, tiny in PRESETS if tiny)}, not {data}")
    raise LabError(f"unknown data {data!r}; choose from {', '.join(known)} or your own module:function")


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
    return replace(chosen.settings, **changes)


def planned(
    data: str,
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
    default = preset(data, quick)
    settings = settings_for(default, given)
    chosen = tuple(spec.parse_all(methods or list(default.methods), settings))
    models.check(settings.model)
    tasks.check(settings)
    reference = None if baseline is None else spec.parse(baseline)
    return Plan(settings, chosen, seeds or default.seeds, reference, first)
