"""A small ResNet with batch norm on Fashion-MNIST at 14 x 14: the task on which sampled m-SAM is held against m-SAM."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from steppe.lab.data import find, idx
from steppe.lab.models.resnet import Residual

TEST = 3000  # of the 10,000 test images: an evaluation after every epoch should not cost more than the epoch
WIDTH = 8
Norm = Callable[[int], nn.Module]


def data(count: int | None = None, side: int = 14) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, labels, test inputs and test labels: ``count`` images or all, averaged to ``side`` pixels."""
    raw = idx.mnist(find("fashion-mnist"))
    parts = (raw.inputs[:count], raw.test_inputs[:TEST])
    images, test = (nn.functional.avg_pool2d(part.float(), 28 // side) for part in parts)
    spread, mean = torch.std_mean(images)
    return (images - mean) / spread, raw.labels[:count], (test - mean) / spread, raw.test_labels[:TEST]


def model(example: Tensor, classes: int, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Return eight layers in three residual blocks, about 20,000 parameters."""
    shapes = ((WIDTH, WIDTH, 1), (WIDTH, 2 * WIDTH, 2), (2 * WIDTH, 4 * WIDTH, 2))
    blocks = [_block(norm, *shape) for shape in shapes]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, classes))
    return nn.Sequential(*_conv(norm, example.shape[0], WIDTH, 3, 1), nn.ReLU(), *blocks, *head)


def _conv(norm: Norm, fan_in: int, fan_out: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False), norm(fan_out)]


def _block(norm: Norm, fan_in: int, fan_out: int, stride: int) -> Residual:
    first, second = (fan_in, fan_out, 3, stride), (fan_out, fan_out, 3, 1)
    branch = nn.Sequential(*_conv(norm, *first), nn.ReLU(), *_conv(norm, *second))
    same = stride == 1 and fan_in == fan_out
    return Residual(branch, nn.Identity() if same else nn.Sequential(*_conv(norm, fan_in, fan_out, 1, stride)))
