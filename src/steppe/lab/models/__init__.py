"""Models by name, for inputs shaped like an example."""

import re
from itertools import pairwise
from typing import Any

from torch import nn

from steppe.lab.errors import LabError, unknown
from steppe.lab.importing import called
from steppe.lab.models import resnet, vit

__all__ = ["build", "check", "cnn", "mlp"]

GRAMMAR = {
    "mlp-256-256": r"mlp(-\d+)+",
    "cnn-16": r"cnn-\d+",
    "resnet18": r"resnet(18|50)(-w\d+)?(-gn)?",
    "wrn28-10-gn": r"wrn\d+-\d+(-gn)?",
    "vit-s4": r"vit-((ti|s|b)\d+|\d+x\d+-p\d+)",
    "module:function": r"[\w.]+:[\w.]+",
}


def check(name: str) -> None:
    """Raise a ``LabError`` if no model has this name."""
    if not any(re.fullmatch(pattern, name) for pattern in GRAMMAR.values()):
        raise unknown(f"unknown model {name!r}", name, GRAMMAR)


def build(name: str, example: Any, classes: int) -> nn.Module:
    """Return the model of this name for inputs shaped like ``example``.

    ``mlp-WIDTH-WIDTH...``, ``cnn-WIDTH``; ``resnet18``, ``resnet50`` (``-wWIDTH`` for another first width than 64) and
    ``wrnDEPTH-K``, each with batch norm or, with ``-gn``, group norm; ``vit-s4`` (size ti, s or b, side of a patch) or
    ``vit-WIDTHxDEPTH-pPATCH``; ``module:function``, called with (example, classes).

    Raises:
        LabError: no model has this name, or it does not fit the example.
    """
    check(name)
    if ":" in name:
        made = called(name, example, classes)
        if not isinstance(made, nn.Module):
            raise LabError(f"{name} must return a torch.nn.Module, not {type(made).__name__}")
        return made
    if name.startswith("mlp"):
        return mlp([example.numel(), *map(int, name.split("-")[1:]), classes])
    if example.ndim != 3:
        raise LabError(f"model {name} takes images, and an example has shape {tuple(example.shape)}")
    if name.startswith("cnn"):
        return cnn(example.shape[0], int(name.split("-")[1]), classes)
    return vit.build(name, example, classes) if name.startswith("vit") else resnet.build(name, example, classes)


def mlp(widths: list[int]) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, width: int, classes: int) -> nn.Sequential:
    """Return three strided convolutions with group norm (which, unlike batch norm, keeps examples apart)."""
    widths = [channels, width, 2 * width, 4 * width]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), nn.GroupNorm(4, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
