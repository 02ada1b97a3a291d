"""Residual networks: ResNet-18 and -50 (He et al. 2015, arXiv 1512.03385), wide ones (Zagoruyko and Komodakis 2016,
arXiv 1605.07146).

Images smaller than 64 pixels get the stem of the CIFAR variants, one 3 x 3 convolution; larger ones that of ImageNet,
7 x 7 with stride 2 and max pooling. The papers use batch norm. Group norm keeps examples independent of one another,
which the shared passes of m-SAM need.
"""

import math
import re
from collections.abc import Callable

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
_LAYERS = {"18": (2, 2, 2, 2), "50": (3, 4, 6, 3)}
_LARGE = 64  # pixels


def build(name: str, example: Tensor, classes: int) -> nn.Sequential:
    """Return ``resnet18``, ``resnet50-gn``, ``resnet18-w16`` or ``wrn28-10`` for images shaped like ``example``."""
    norm: Norm = _group_norm if name.endswith("-gn") else nn.BatchNorm2d
    if wide := re.match(r"wrn(\d+)-(\d+)", name):
        net = _wide_resnet(example.shape[0], int(wide[1]), int(wide[2]), classes, norm)
    else:
        width = int(found[1]) if (found := re.search(r"-w(\d+)", name)) else 64
        net = _resnet(example, name[6:8], width, classes, norm)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _group_norm(channels: int) -> nn.GroupNorm:
    """Return group norm with 32 groups, or as many as divide both 32 and the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _conv(fan_in: int, fan_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False)


def _convs(norm: Norm, *shapes: tuple[int, int, int, int]) -> nn.Sequential:
    """Return convolutions (fan-in, fan-out, size, stride), each normalised, with ReLU between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out, size, stride in shapes:
        layers += [_conv(fan_in, fan_out, size, stride), norm(fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    """``relu(branch(x) + shortcut(x))``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return nn.functional.relu(self.branch(x) + self.shortcut(x))


def _resnet(example: Tensor, depth: str, width: int, classes: int, norm: Norm) -> nn.Sequential:
    """Return a residual network of four stages, each twice as wide as the one before."""
    large = example.shape[-1] >= _LARGE
    stem = _convs(norm, (example.shape[0], width, *((7, 2) if large else (3, 1))))
    parts: list[nn.Module] = [*stem, nn.ReLU(), *([nn.MaxPool2d(3, 2, padding=1)] if large else [])]
    fan_in = width
    for stage, count in enumerate(_LAYERS[depth]):
        inner = width * 2**stage
        for i in range(count):
            stride = 2 if stage and not i else 1
            shapes = [(fan_in, inner, 3, stride), (inner, inner, 3, 1)]
            if depth == "50":
                shapes = [(fan_in, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1)]
            fan_out, branch = shapes[-1][1], _convs(norm, *shapes)
            same = stride == 1 and fan_in == fan_out
            parts.append(Residual(branch, nn.Identity() if same else _convs(norm, (fan_in, fan_out, 1, stride))))
            fan_in = fan_out
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, classes))


class Wide(nn.Module):
    """A block that normalises first; where the shape changes, the shortcut starts after the first activation."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.enter = nn.Sequential(norm(fan_in), nn.ReLU())
        self.branch = nn.Sequential(
            _conv(fan_in, fan_out, 3, stride), norm(fan_out), nn.ReLU(), _conv(fan_out, fan_out, 3)
        )
        self.shortcut = None if stride == 1 and fan_in == fan_out else _conv(fan_in, fan_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        entered = self.enter(x)
        out: Tensor = self.branch(entered) + (x if self.shortcut is None else self.shortcut(entered))
        return out


def _wide_resnet(channels: int, depth: int, widen: int, classes: int, norm: Norm) -> nn.Sequential:
    """Return WRN-depth-widen: three stages of (depth - 4) / 6 blocks, 16, 32 and 64 times ``widen`` wide."""
    parts: list[nn.Module] = [_conv(channels, 16, 3)]
    fan_in = 16
    for stage in range(3):
        fan_out = 16 * widen * 2**stage
        for i in range((depth - 4) // 6):
            parts.append(Wide(fan_in, fan_out, 2 if stage and not i else 1, norm))
            fan_in = fan_out
    head = (norm(fan_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(fan_in, classes))
    return nn.Sequential(*parts, *head)
