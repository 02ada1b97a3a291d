"""The checks of ``steppe doctor``: environment, devices, optional packages and data, and how to get missing ones."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

# package, what needs it, how to get it
_PACKAGES = (
    ("numpy", "the laboratory", "lab"),
    ("scipy", "statistics", "lab"),
    ("scikit-learn", "the digits", "lab"),
    ("plotly", "the report's figures", "lab"),
    ("matplotlib", "pictures of toy, sde and measure", "lab"),
    ("optuna", "searches", "lab"),
    ("lightning-fabric", "several processes: DDP, FSDP2", "distributed"),
    ("tensorboard", "run --tensorboard", "tensorboard"),
    ("accelerate", "steppe.integrations.accelerate, .huggingface", "accelerate"),
    ("lightning", "steppe.integrations.lightning", "lightning"),
)


@dataclass(frozen=True)
class Check:
    """One thing that may be installed: its kind (environment, device, package, data), and how to get it."""

    kind: str
    name: str
    found: bool
    detail: str
    hint: str = ""


def checks() -> list[Check]:
    """Return every check, in the order of display."""
    return [*_environment(), *_devices(), *_packages(), *_data()]


def _environment() -> Iterator[Check]:
    from steppe.lab.environment import environment

    for name in ("steppe", "torch", "python", "platform", "cpu", "cores"):
        yield Check("environment", name, True, environment()[name])


def _devices() -> Iterator[Check]:
    import torch

    from steppe.lab.hardware import missing

    yield Check("device", "cpu", True, f"{torch.get_num_threads()} threads")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    wheel = "" if names else "install the torch build for your GPU: pytorch.org"
    yield Check("device", "cuda", bool(names), ", ".join(names) or missing("cuda"), wheel)
    if platform.system() == "Darwin":
        there = torch.backends.mps.is_available()
        yield Check("device", "mps", there, "" if there else missing("mps"))


def _packages() -> Iterator[Check]:
    for name, use, extra in _PACKAGES:
        yield _package(name, use, f'pip install "steppe[{extra}]"')
    if _installed("torchvision") is None:
        return
    try:
        import torchvision  # type: ignore[import-not-found] # noqa: F401
    except Exception as error:  # a build for another torch fails in many ways
        reason = f"torchvision does not import: {str(error).splitlines()[0]}"
        yield Check("package", "torchvision", False, reason, "pip uninstall torchvision: it breaks transformers")


def _package(name: str, use: str, hint: str) -> Check:
    there = _installed(name)
    return Check("package", name, there is not None, f"{there or ''} ({use})".strip(), "" if there else hint)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _data() -> Iterator[Check]:
    from steppe.lab import data
    from steppe.lab.errors import LabError

    yield Check("data", "digits", _installed("scikit-learn") is not None, "in scikit-learn")
    for name, source in data.SOURCES.items():
        try:
            yield Check("data", name, True, str(data.find(name)))
        except LabError:
            looked = ", ".join(str(folder) for folder in data.places(name))
            yield Check("data", name, False, f"looked in {looked}", source.hint)
