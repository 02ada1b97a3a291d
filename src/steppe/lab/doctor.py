"""The checks of ``steppe doctor``: versions, devices and data, and how to get what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from steppe.lab.errors import LabError, how_to_install

_EXTRAS = {  # what the commands use, and the extra that brings it
    "scipy": "lab",
    "scikit-learn": "lab",
    "matplotlib": "measure",
    "optuna": "lab",
    "lightning-fabric": "distributed",
}


@dataclass(frozen=True)
class Check:
    """One thing that may be here: its kind (environment, device, package, data), and how to get it."""

    kind: str
    name: str
    found: bool
    detail: str
    hint: str = ""


def checks() -> Iterator[Check]:
    """Yield every check, in the order of display."""
    import torch

    from steppe.lab import data, hardware, record

    for name, value in record.environment().items():
        yield Check("environment", name, True, value)
    devices = hardware.found()
    for name in ("cuda", "mps", "cpu"):
        wheel = "" if name in devices else "install the torch build for your device: pytorch.org"
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if name == "cuda" else []
        yield Check("device", name, name in devices, ", ".join(cards), wheel)
    for name, extra in _EXTRAS.items():
        there = _installed(name)
        yield Check("package", name, there is not None, there or "", "" if there else how_to_install(extra))
    yield Check("data", "digits", _installed("scikit-learn") is not None, "in scikit-learn")
    for name, source in data.SOURCES.items():
        try:
            yield Check("data", name, True, str(data.find(name)))
        except LabError:
            looked = ", ".join(map(str, data.places(name)))
            yield Check("data", name, False, f"looked in {looked}", source.hint)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
