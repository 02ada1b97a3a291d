"""The models that are timed, on random data: what a step costs does not depend on what is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from steppe.lab.models import build, mlp

CLASSES, VOCABULARY, LENGTH = 10, 256, 64


def resnet18(width: int, side: int = 32) -> nn.Module:
    """ResNet-18, group norm for batch norm; ``width`` 64 has 62 tensors, 11.2 M parameters."""
    return build(f"resnet18-w{width}-gn", torch.empty(3, side, side), CLASSES)


def cnn() -> nn.Module:
    """A small network for 28 x 28 images, group norm."""
    conv = lambda i, o, stride: (nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(8, o), nn.ReLU())  # noqa: E731
    return nn.Sequential(
        *conv(1, 32, 1), *conv(32, 64, 2), *conv(64, 64, 2), nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(),
        nn.Linear(128, CLASSES),
    )  # fmt: skip


def layers(width: int, depth: int, heads: int) -> nn.ModuleList:
    """Pre-norm transformer layers without dropout."""
    options: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(depth))


class ViT(nn.Module):
    """A vision transformer, mean pooling; for 32 x 32 images in patches of 4, or others."""

    def __init__(self, width: int, depth: int, heads: int, side: int = 32, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.layers, self.norm, self.head = layers(width, depth, heads), nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class GPT(nn.Module):
    """A causal transformer; the head is the embedding's transpose."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.layers, self.norm = layers(width, depth, heads), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next token."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


def with_batch_norm(model: nn.Module) -> nn.Module:
    """Return the model with batch norm in place of every group norm."""
    for module in list(model.modules()):
        for name, inner in module.named_children():
            if isinstance(inner, nn.GroupNorm):
                setattr(module, name, nn.BatchNorm2d(inner.num_channels))
    return model


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of low rank beside it (Hu et al. 2022, arXiv 2106.09685)."""

    def __init__(self, frozen: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The frozen layer and the update."""
        return self.frozen(x) + self.up(self.down(x))


def with_lora(model: nn.Module) -> nn.Module:
    """Return the frozen model with low-rank updates of the linear layers between its attention layers."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name in ("linear1", "linear2"):
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, LoRA(getattr(module, name)))
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return a base optimizer for what is trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def classify(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Every example's cross-entropy; over tokens its mean."""
    inputs, targets = data
    losses = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="none")
    return losses if targets.dim() == 1 else losses.view(targets.shape).mean(1)


def vectors(size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random inputs of ``size`` numbers, random classes."""
    return lambda n: (torch.randn(n, size), torch.randint(CLASSES, (n,)))


def images(channels: int, side: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Random images, random classes."""
    return lambda n: (torch.randn(n, channels, side, side), torch.randint(CLASSES, (n,)))


def tokens(n: int) -> tuple[Tensor, Tensor]:
    """Random tokens, random next tokens."""
    return torch.randint(VOCABULARY, (n, LENGTH)), torch.randint(VOCABULARY, (n, LENGTH))


@dataclass(frozen=True)
class Case:
    """A model, its data, its loss per example, and the batch size (another on a CPU where that is too slow)."""

    kind: str  # mlp, transformer or conv
    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    batch_size: int = 128
    cpu_batch_size: int = 128
    loss: Callable[[Any, Any], Tensor] = classify


CASES = {
    "digits_mlp": Case("mlp", lambda: mlp([64, 256, 256, 10]), vectors(64)),
    "mlp": Case("mlp", lambda: mlp([784, 1024, 1024, 10]), vectors(784)),
    "cnn": Case("conv", cnn, images(1, 28)),
    "resnet18_w16": Case("conv", lambda: resnet18(16), images(3, 32), cpu_batch_size=32),
    "resnet18_w16_bn": Case("conv", lambda: with_batch_norm(resnet18(16)), images(3, 32), cpu_batch_size=32),
    "resnet18_w32": Case("conv", lambda: resnet18(32), images(3, 32), cpu_batch_size=32),
    "resnet18": Case("conv", lambda: resnet18(64), images(3, 32), cpu_batch_size=32),
    "vit_small": Case("transformer", lambda: ViT(128, 4, 4), images(3, 32), cpu_batch_size=32),
    "vit_s": Case("transformer", lambda: ViT(384, 12, 6), images(3, 32), cpu_batch_size=16),
    "resnet18_224": Case("conv", lambda: resnet18(64, 224), images(3, 224), batch_size=64, cpu_batch_size=4),
    "vit_s_224": Case("transformer", lambda: ViT(384, 12, 6, 224, 16), images(3, 224), batch_size=64, cpu_batch_size=4),
    "gpt_small": Case("transformer", lambda: GPT(128, 4, 4), tokens, cpu_batch_size=32),
}
