"""The two small models: a ReLU perceptron for vectors, a convolutional net for images."""

from itertools import pairwise

from torch import nn


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
