"""How many copies of the parameters a step needs beside the parameters themselves."""

import gc

import pytest
import torch
from benchmarks.memory import Storages
from torch import nn

import steppe
from tests.cases import sgd

SIDE, TENSORS = 200, 8
COPY = TENSORS * SIDE * SIDE * 4  # bytes of one copy of the parameters


class Wide(nn.Module):
    """Many parameters, no activations to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(SIDE, SIDE) for _ in range(TENSORS))

    def forward(self, x):
        return sum((x @ p).square().mean(1) for p in self.layers)


def copies(make) -> tuple[float, float]:
    """Peak and what is left after the step, in copies of the parameters."""
    torch.manual_seed(0)
    model = Wide()
    opt = make(sgd(model))
    batch = steppe.Batch(model, lambda model, x: model(x), torch.randn(2, SIDE))
    for _ in range(2):  # the second step is rehearsed anew
        opt.step(batch)
    opt.zero_grad()
    gc.collect()
    with Storages() as storages:
        opt.step(batch)
        opt.zero_grad()
        left = storages.total
    return storages.peak / COPY, left / COPY


SLACK = 0.4  # a temporary of one tensor or two (1/8 each), and activations


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda b: b, 1),  # the gradient
        (lambda b: steppe.SAM(b, parallel=False), 2),  # and the saved weights
        (lambda b: steppe.USAM(b, parallel=False), 2),
        (lambda b: steppe.SAM(b), 2),  # on a batch, too: plain SAM holds no factors
        (lambda b: steppe.SAM(b, cosine=True, parallel=False), 3),  # and g
        (lambda b: steppe.ASAM(b), 2),
        (lambda b: steppe.FisherSAM(b), 2),
        (lambda b: steppe.WSAM(b), 3),
        (lambda b: steppe.GSAM(b), 3),
        (lambda b: steppe.FSAM(b), 3),
        (lambda b: steppe.VaSSO(b), 3),
        (lambda b: steppe.LookSAM(b, k=1), 3),
        (lambda b: steppe.SAM(b, rho=0.0), 1),
        (lambda b: steppe.NSAM(b, full=lambda: None, rho=0.0), 1),
    ],
    ids=[
        "plain",
        "SAM",
        "USAM",
        "SAM on a batch",
        "SAM cosine",
        "ASAM",
        "Fisher",
        "WSAM",
        "GSAM",
        "FSAM",
        "VaSSO",
        "LookSAM",
        "rho 0",
        "NSAM rho 0",
    ],
)
def test_copies_of_the_parameters(make, expected: int) -> None:
    peak, left = copies(make)
    assert expected - 0.1 < peak < expected + SLACK
    assert left < 0.01  # nothing is kept between steps


def test_what_a_method_remembers_is_all_that_it_keeps() -> None:
    for make, kept in ((steppe.VaSSO, 1), (steppe.FSAM, 1), (lambda b: steppe.LookSAM(b, k=2), 1), (steppe.ASAM, 0)):
        model = Wide()
        opt = make(sgd(model))
        with Storages() as storages:
            opt.step(steppe.Batch(model, lambda model, x: model(x), torch.randn(2, SIDE)))
            opt.zero_grad()
            gc.collect()
            left = storages.total
        assert left / COPY == pytest.approx(kept, abs=0.01)
