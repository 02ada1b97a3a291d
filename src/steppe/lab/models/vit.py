"""Vision transformers (Dosovitskiy et al. 2020, arXiv 2010.11929), without dropout, heads of width 64."""

import re

import torch
from torch import Tensor, nn

from steppe.lab.errors import LabError

_SIZES = {"ti": (192, 12), "s": (384, 12), "b": (768, 12)}  # width and depth


def build(name: str, example: Tensor, classes: int) -> nn.Module:
    """Return ``vit-s4`` (size, side of a patch) or ``vit-WIDTHxDEPTH-pPATCH`` for images shaped like ``example``."""
    if named := re.fullmatch(r"vit-([a-z]+)(\d+)", name):
        (width, depth), patch = _SIZES[named[1]], int(named[2])
    else:
        width, depth, patch = map(int, re.findall(r"\d+", name))
    channels, height, across = example.shape
    if height % patch or across % patch:
        raise LabError(f"model {name}: patches of {patch} do not tile images of {height} x {across}")
    return VisionTransformer(channels, (height // patch) * (across // patch), patch, width, depth, classes)


class VisionTransformer(nn.Module):
    """Patches and a class token, learned positions, blocks that normalise first, a linear head on the class token."""

    def __init__(self, channels: int, patches: int, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        for p in (self.token, self.position):
            nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)[:, 0]))
        return logits


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of x's shape (n, tokens, width)."""
        n, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
