"""A small ResNet with batch norm on Fashion-MNIST at 14 x 14: the task on which sampled m-SAM is held against m-SAM."""

import torch
from torch import Tensor, nn

from steppe.lab.data import find, idx
from steppe.lab.models.resnet import Residual

TEST = 3000  # of the 10,000 test images: an evaluation after every epoch should not cost more than the epoch
WIDTH = 8


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs, labels, test inputs and test labels; images are averaged over 2 x 2 pixels."""
    raw = idx.mnist(find("fashion-mnist"))
    images, test = (nn.functional.avg_pool2d(part.float(), 2) for part in (raw.inputs, raw.test_inputs[:TEST]))
    spread, mean = torch.std_mean(images)
    return (images - mean) / spread, raw.labels, (test - mean) / spread, raw.test_labels[:TEST]


def model(example: Tensor, classes: int) -> nn.Sequential:
    """Return eight layers in three residual blocks, about 20,000 parameters."""
    blocks = [_block(WIDTH, WIDTH, 1), _block(WIDTH, 2 * WIDTH, 2), _block(2 * WIDTH, 4 * WIDTH, 2)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, classes))
    return nn.Sequential(*_conv(example.shape[0], WIDTH, 3, 1), nn.ReLU(), *blocks, *head)


def _conv(fan_in: int, fan_out: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(fan_in, fan_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(fan_out)]


def _block(fan_in: int, fan_out: int, stride: int) -> Residual:
    branch = nn.Sequential(*_conv(fan_in, fan_out, 3, stride), nn.ReLU(), *_conv(fan_out, fan_out, 3, 1))
    same = stride == 1 and fan_in == fan_out
    return Residual(branch, nn.Identity() if same else nn.Sequential(*_conv(fan_in, fan_out, 1, stride)))
