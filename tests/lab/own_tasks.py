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


def high():
    """The same with the negative error as its metric, which should be high."""
    task = regression()
    return task | {"metric": lambda *both: -task["metric"](*both), "higher": True, "name": "minus error"}


def named_inputs():
    """The same with the columns of its inputs in two tensors by name."""
    task = regression()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = task["model"]()

        def forward(self, parts):
            return self.line(torch.cat([parts["left"], parts["right"]], 1))

    split = {
        key: ({"left": task[key][0][:, :1], "right": task[key][0][:, 1:]}, task[key][1]) for key in ("train", "test")
    }
    return task | split | {"model": Net}


def root():
    """The same with a metric of whole sets: the root of the mean squared error."""
    return regression() | {"metric": lambda y, t: (y - t).square().mean().sqrt(), "whole": True, "name": "RMSE"}


def validated():
    """The same with its last 32 training examples held out by the task."""
    task = regression()
    (x, y) = task["train"]
    return task | {"train": (x[:96], y[:96]), "validation": (x[96:], y[96:])}


def without_loss():
    return {key: value for key, value in regression().items() if key not in ("loss", "metric", "name")}


def misspelt():
    return no_model() | {"modle": lambda: nn.Linear(4, 1)}


def arrays():
    return regression() | {"train": tuple(part.numpy() for part in regression()["train"])}


def one_number():
    return root() | {"whole": False}


def higher_nothing():
    return without_loss() | {"loss": regression()["loss"], "higher": True}


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
