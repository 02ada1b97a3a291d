"""Models whose micro-batch gradients factor: name -> (model, data, loss)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from steppe.factored.collect import Cost


class ConvNet(nn.Module):
    """Strides, paddings, dilations, groups; group and instance norm; one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, groups=2),
            nn.InstanceNorm2d(6, affine=True),
            nn.ReLU(),
            nn.Conv2d(6, 4, (3, 1), padding="same", dilation=(2, 1), bias=False),
        )
        self.one, self.three = nn.Conv1d(4, 3, 3, padding=1, stride=2), nn.Conv3d(1, 2, 3, padding=(0, 1, 1))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(x)
        x = torch.relu(self.one(x.flatten(2)))
        x = torch.relu(self.three(x.unflatten(2, (4, 2))[:, None]))
        return self.head(x.flatten(1))


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(2, o)
        self.two, self.norm_two = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(2, o)
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.GroupNorm(2, o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(F.relu(self.norm_one(self.one(x)), inplace=True)))
        y += self.short(x)
        return F.relu(y, inplace=True)


def resnet() -> nn.Module:
    blocks = [Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 2)]
    return nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class ViT(nn.Module):
    """Patches, a class token, learned positions, LayerScale, torch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 3, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.scale = nn.Parameter(torch.rand(8))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=first, norm_first=first)
            for first in (True, False)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        x = self.layers[0](x) * self.scale
        return self.head(self.layers[1](x.transpose(0, 1))[0])


class RMS(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class GPT(nn.Module):
    """Tokens and positions, causal attention through one packed map, a low-rank adapter, a tied head."""

    def __init__(self, d: int = 8, vocabulary: int = 11, length: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d, padding_idx=0), nn.Embedding(length, d)
        self.norm, self.packed, self.out = RMS(d), nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.down, self.up = nn.Linear(d, 2, bias=False), nn.Linear(2, d, bias=False)  # LoRA
        self.into, self.bias = nn.Parameter(torch.randn(d, 2 * d) / 3), nn.Parameter(torch.zeros(2 * d))
        self.back = nn.Linear(2 * d, d)
        self.last = nn.LayerNorm(d)

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1], device=index.device))
        for _ in range(2):  # the same block twice
            z = self.norm(x)
            q, k, v = (self.packed(z)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.out(a) + self.up(self.down(a))
            x = x + self.back(F.gelu(self.norm(x) @ self.into + self.bias))
        return F.linear(self.last(x), self.tokens.weight)


@dataclass(frozen=True)
class Example:
    make: Callable[[], nn.Module]
    data: Callable[[int], Any]

    def model(self, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().to(dtype)

    def batch(self, model: nn.Module, n: int, dtype: torch.dtype, seed: int = 1) -> steppe.Batch:
        torch.manual_seed(seed)
        data = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.data(n))
        return steppe.Batch(model, loss, data)


def hold(whole: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix and table whole, or as factors, whatever the rule says; ``None`` leaves it to the rule."""
    if whole is not None:
        monkeypatch.setattr(Cost, "whole", lambda *_: whole)
        monkeypatch.setattr(Cost, "table", lambda *_: whole)


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    out = model(data[0])
    losses = F.cross_entropy(out.flatten(0, -2), data[1].flatten(), reduction="none")
    return losses.view(len(data[1]), -1).mean(1)


def images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 9, 9), torch.randint(3, (n,))


EXAMPLES = {
    "mlp": Example(
        lambda: nn.Sequential(
            nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Linear(8, 3)
        ),
        lambda n: (torch.randn(n, 5), torch.randint(3, (n,))),
    ),
    "cnn": Example(ConvNet, images),
    "resnet": Example(resnet, images),
    "vit": Example(ViT, images),
    "gpt": Example(GPT, lambda n: (torch.randint(11, (n, 6)), torch.randint(11, (n, 6)))),
}
