"""Models at the sizes that people train on one GPU, on random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class LoRA(nn.Module):
    """``W x + B A x`` with ``W`` frozen."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.whole = nn.Linear(inputs, outputs, bias=False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.whole(x) + self.up(self.down(x))


Layer = Callable[[int, int], nn.Module]


def frozen_or_lora(rank: int) -> Layer:
    """Return a maker of linear layers: plain ones for rank 0."""
    return (lambda i, o: LoRA(i, o, rank)) if rank else (lambda i, o: nn.Linear(i, o, bias=False))


class Block(nn.Module):
    """A decoder layer in Llama's shape: RMS norm, causal attention, and a gated unit."""

    def __init__(self, width: int, heads: int, hidden: int, linear: Layer) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.gate, self.into, self.out = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after attention and the gated unit."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.out(F.silu(self.gate(y)) * self.into(y))


class Decoder(nn.Module):
    """A causal language model."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, vocabulary: int, rank: int = 0) -> None:
        super().__init__()
        linear = frozen_or_lora(rank)
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, linear) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)
        if rank:
            for module in (
                self.tokens,
                self.norm,
                self.head,
                *(b for each in self.blocks for b in (each.norm1, each.norm2)),
            ):
                module.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next token."""
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def classify(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every example, in float32; over tokens its mean."""
    inputs, targets = data
    found = F.cross_entropy(model(inputs).float().flatten(0, -2), targets.flatten(), reduction="none")
    return found if targets.dim() == 1 else found.view(targets.shape).mean(1)


@dataclass(frozen=True)
class Case:
    """A model, its data, how many examples a batch has, and whether autocast runs it in bfloat16."""

    model: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]]
    n: int
    bf16: bool = False
    classes: int = 10


def vision(name: str, side: int, n: int, bf16: bool = False, classes: int = 10) -> Case:
    """A model of the laboratory on random images."""

    def model() -> nn.Module:
        from steppe.lab import models

        return models.build(name, torch.zeros(3, side, side), classes)

    return Case(model, lambda n: (torch.randn(n, 3, side, side), torch.randint(classes, (n,))), n, bf16, classes)


def text(vocabulary: int, length: int, n: int, **shape: Any) -> Case:
    """A decoder on random tokens, in bfloat16."""
    draw = lambda n: torch.randint(vocabulary, (n, length))  # noqa: E731
    return Case(lambda: Decoder(vocabulary=vocabulary, **shape), lambda n: (draw(n), draw(n)), n, bf16=True)


CASES = {
    "resnet18": vision("resnet18", 32, 128),
    "resnet18-gn": vision("resnet18-gn", 32, 128),
    "wrn28-10": vision("wrn28-10", 32, 128, bf16=True),
    "wrn28-10-gn": vision("wrn28-10-gn", 32, 128, bf16=True),
    "resnet50": vision("resnet50", 224, 128, bf16=True, classes=1000),
    "vit-s16": vision("vit-s16", 224, 128, bf16=True, classes=1000),
    "gpt-124m": text(50257, 1024, 16, width=768, depth=12, heads=12, hidden=2048),
    "llama-1b-lora": text(32000, 1024, 8, width=2048, depth=20, heads=16, hidden=5632, rank=16),
}
TINY = {
    "resnet18": vision("resnet18-w16", 16, 16),
    "vit-s16": vision("vit-32x2-p4", 16, 16, bf16=True),
    "gpt-124m": text(64, 16, 8, width=32, depth=2, heads=2, hidden=64),
    "llama-1b-lora": text(64, 16, 8, width=32, depth=2, heads=2, hidden=64, rank=4),
}
