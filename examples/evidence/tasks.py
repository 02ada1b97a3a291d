"""The tasks of the evidence that steppe does not bring itself: ``steppe compare --task tasks:mnist1d``.

Put this folder and the repository's root on PYTHONPATH. ``texts`` looks for ``fortunes.pt`` in $STEPPE_TEXT, which
``encode_fortunes.py`` writes.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.near_sgd_resnet import data as clothes
from benchmarks.near_sgd_resnet import model as resnet
from benchmarks.near_sgd_variants import mnist_1d
from torch import Tensor, nn

from steppe.lab.models import build, cnn, mlp


def mnist1d() -> dict[str, Any]:
    """Return MNIST-1D: 3,000 signals of 40 values to fit and 1,000 to test."""
    x, y = mnist_1d(5000)  # of which the package keeps the last fifth for tests
    return {"train": (x[:3000], y[:3000]), "test": (x[4000:], y[4000:]), "model": partial(mlp, [40, 128, 128, 128, 10])}


def fashion() -> dict[str, Any]:
    """Return Fashion-MNIST (Debian's dataset-fashion-mnist) at 14 x 14: 1,000 and 3,000 examples, a small CNN."""
    return _clothes(1000, 14, partial(cnn, 1, 8, 10))


def fashion_28() -> dict[str, Any]:
    """Return 2,000 examples at 28 x 28, the same CNN."""
    return _clothes(2000, 28, partial(cnn, 1, 8, 10))


def fashion_resnet() -> dict[str, Any]:
    """Return 2,000 examples at 14 x 14, a ResNet of eight layers with batch norm."""
    return _clothes(2000, 14, partial(resnet, torch.zeros(1, 14, 14), 10))


def fashion_vit() -> dict[str, Any]:
    """Return 2,000 examples at 14 x 14, a vision transformer of two blocks of width 48, patches of 7 x 7."""
    return _clothes(2000, 14, partial(build, "vit-48x2-p7", torch.zeros(1, 14, 14), 10))


def _clothes(count: int, side: int, model: Callable[[], nn.Module]) -> dict[str, Any]:
    x, y, test_x, test_y = clothes(count, side)
    return {"train": (x, y), "test": (test_x, test_y), "model": model}


def diabetes() -> dict[str, Any]:
    """Return scikit-learn's diabetes: 332 patients to fit and 110 to test, 10 columns; regression, squared error."""
    from sklearn.datasets import load_diabetes

    inputs, values = load_diabetes(return_X_y=True)
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)[:, None]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, rest = order[:332], order[332:]
    x, y = (x - x[fit].mean(0)) / x[fit].std(0), (y - y[fit].mean()) / y[fit].std()
    return {
        "train": (x[fit], y[fit]),
        "test": (x[rest], y[rest]),
        "model": partial(mlp, [10, 64, 64, 1]),
        "loss": lambda outputs, targets: (outputs - targets).square().mean(1),
        "name": "squared error / variance",
    }


def texts() -> dict[str, Any]:
    """Return Debian's fortunes as sentence embeddings of 384 numbers; the class is the file of a fortune."""
    path = Path(os.environ.get("STEPPE_TEXT", ".")) / "fortunes.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run encode_fortunes.py, or name its folder in STEPPE_TEXT")
    found = torch.load(path, weights_only=True)
    inputs, classes = found["inputs"].float(), found["classes"]
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    fit, rest = order[:2000], order[2000:4000]
    return {
        "train": (inputs[fit], classes[fit]),
        "test": (inputs[rest], classes[rest]),
        "model": partial(mlp, [inputs.shape[1], 256, int(classes.max()) + 1]),
    }


def letters() -> dict[str, Any]:
    """Return pieces of 32 letters of Debian's fortunes; a small GPT predicts every letter from those before it."""
    text = (Path(os.environ.get("STEPPE_TEXT", ".")) / "fortunes.txt").read_text()
    known = sorted(set(text))
    codes = torch.tensor([known.index(letter) for letter in text])
    pieces = codes[: len(codes) // 33 * 33].reshape(-1, 33)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    fit, rest = pieces[order[:1024]], pieces[order[1024:2048]]

    def bits(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1) / math.log(2)

    return {
        "train": (fit[:, :-1], fit[:, 1:]),
        "test": (rest[:, :-1], rest[:, 1:]),
        "model": partial(GPT, len(known), 32),
        "loss": lambda outputs, targets: bits(outputs, targets) * math.log(2),
        "metric": bits,
        "name": "bits a letter",
    }


class GPT(nn.Module):
    """A character-level transformer: learned positions, ``depth`` blocks that normalise first, causal attention."""

    def __init__(self, letters: int, length: int, width: int = 48, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.letter, self.position = nn.Embedding(letters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(GPTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits, shape (n, length, letters)."""
        logits: Tensor = self.head(self.norm(self.blocks(self.letter(codes) + self.position)))
        return logits


class GPTBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of x's shape (n, length, width)."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
