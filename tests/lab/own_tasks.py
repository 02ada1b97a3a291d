"""Tasks as a user writes them: a regression, tokens, and mistakes."""

import torch
from torch import nn


def regression():
    draw = torch.Generator().manual_seed(0)
    x, slope = torch.randn(160, 4, generator=draw), torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    y = x @ slope + 0.1 * torch.randn(160, 1, generator=draw)

    def squared(outputs, targets):
        return (outputs - targets).square().mean(1)

    def absolute(outputs, targets):
        return (outputs - targets).abs().mean(1)

    return {
        "train": (x[:128], y[:128]),
        "test": (x[128:], y[128:]),
        "model": lambda: nn.Linear(4, 1),
        "loss": squared,
        "metric": absolute,
        "name": "absolute error",
    }


def tokens():
    """Predict the next of five tokens, each one more than the last, modulo five."""
    starts = torch.arange(96) % 5
    rows = (starts[:, None] + torch.arange(9)) % 5

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)

    return {
        "train": (rows[:64, :-1], rows[:64, 1:]),
        "test": (rows[64:, :-1], rows[64:, 1:]),
        "model": lambda: nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5)),
        "loss": loss,
        "name": "nats a token",
    }


def classes():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(96, 3, generator=draw)
    y = x.argmax(1)
    return {"train": (x[:64], y[:64]), "test": (x[64:], y[64:]), "model": lambda: nn.Linear(3, 3)}


def one_mean():
    return regression() | {"loss": lambda outputs, targets: (outputs - targets).square().mean()}


def no_model():
    return {key: value for key, value in regression().items() if key != "model"}
