"""How micro-batches' gradients are held: whole in blocks, as factors with biases, by the rows of a table."""

import pytest
import torch
from torch import nn

import steppe
from steppe.factored.collect import Cost
from steppe.factored.gradients import Factors, Rows, Whole, squared_norms
from steppe.factored.maps import Dense, Lookup, Use
from steppe.factored.microbatches import MicroBatches
from tests.cases import sgd, sgdm
from tests.factored_models import EXAMPLES, Example
from tests.test_factored import N, assert_equal, ends

HEIGHT, WIDTH, Q = 7, 3, 4


def lookups(n: int, seed: int = 0) -> Use:
    random = torch.Generator().manual_seed(seed)
    index = torch.randint(HEIGHT, (n, Q), generator=random)
    return Use(Lookup(HEIGHT), index, torch.randn(n, Q, WIDTH, generator=random, dtype=torch.float64))


def tables(uses: list[Use], parts: MicroBatches) -> torch.Tensor:
    """``G_k``, by loops."""
    G = torch.zeros(parts.k, HEIGHT, WIDTH, dtype=torch.float64)
    for use in uses:
        for i, (row, right) in enumerate(zip(use.x.tolist(), use.delta, strict=True)):
            for v, r in zip(row, right, strict=True):
                G[i // parts.m, v] += r
    return G


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 12, 20])
def test_lookups_are_summed_by_row(m: int, times: int) -> None:
    parts, uses = MicroBatches(N, m), [lookups(N, seed) for seed in range(times)]
    G = tables(uses, parts)
    coalesced, whole = Rows(uses, parts), Whole(uses, parts)
    for found in (coalesced, whole):
        torch.testing.assert_close(found.squares, G.square().sum((1, 2)), rtol=1e-12, atol=0)
    other = torch.randint(HEIGHT, (N, 6), generator=torch.Generator().manual_seed(5))  # not those that were recorded
    expected = torch.stack([G[i // m][row] for i, row in enumerate(other)])
    torch.testing.assert_close(coalesced.rows(other), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(whole.chunks), G, rtol=1e-12, atol=1e-14)
    if m == 1:
        c = torch.rand(N, dtype=torch.float64)
        for found in (coalesced, whole, Factors(uses, parts)):
            torch.testing.assert_close(found.weighted(c), torch.einsum("k,kij->ij", c, G), rtol=1e-12, atol=1e-14)


class Text(nn.Module):
    """Tokens and positions that nothing else uses; many more words than a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(200, 5, padding_idx=3), nn.Embedding(6, 5)
        self.head = nn.Linear(5, 11)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        places = torch.arange(index.shape[1])
        return self.head(torch.tanh(self.tokens(index * 3) + self.tokens(index) + self.positions(places)))


TEXT = Example(Text, lambda n: (torch.randint(11, (n, 6)), torch.randint(11, (n, 6))))


@pytest.mark.parametrize("m", [1, 5, 6, 12])
def test_tables_that_are_only_looked_up(m: int) -> None:
    make = lambda model, p: steppe.WSAM(sgdm(model), 0.3, m=m, parallel=p)  # noqa: E731
    assert_equal(ends(TEXT, make), 1e-10)
    exact = lambda model, p: steppe.RWSAM(sgdm(model), 0.3, parallel=p)  # noqa: E731
    model = TEXT.model(torch.float64)
    opt = exact(model, True)
    opt.step(TEXT.batch(model, N, torch.float64))
    assert opt.telemetry.forwards == 2  # no probe


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("radius", [0.3, 0.1, 0.0])
def test_biases_with_a_radius_of_their_own(radius: float, whole: bool, monkeypatch) -> None:
    """A bias rides along with its weight only where both move as far."""
    monkeypatch.setattr(Cost, "whole", lambda *_: whole)

    def make(model: nn.Module, parallel: bool) -> steppe.SAM:
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "rho": radius},
        ]
        return steppe.SAM(sgd(groups), 0.3, m=5, parallel=parallel)

    for name in ("mlp", "cnn", "vit"):  # g_norm is that of the perturbed parameters here
        assert_equal(ends(EXAMPLES[name], make), 1e-10, ("loss", "loss_adv", "eps_norm"))


def test_a_bias_that_two_layers_share() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.two.bias = self.one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))

    example = Example(Shared, EXAMPLES["mlp"].data)
    assert_equal(ends(example, lambda model, p: steppe.SAM(sgdm(model), 0.3, m=5, parallel=p)), 1e-10)


def test_a_bias_is_a_column_of_ones() -> None:
    parts = MicroBatches(N, 5)
    left, right = (
        torch.randn(N, 2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)) for d in (3, 4)
    )
    alone, riding = Factors([Use(Dense(), right, left)], parts), Factors([Use(Dense(), right, left)], parts, bias=1)
    ones = torch.cat([right, torch.ones(N, 2, 1, dtype=torch.float64)], 2)
    augmented = Factors([Use(Dense(), ones, left)], parts)
    assert (alone.bias, riding.bias) == (None, 1)
    torch.testing.assert_close(squared_norms([riding], []), squared_norms([augmented], []))
    x, s = torch.randn(N, 2, 4, dtype=torch.float64), torch.rand(parts.k, dtype=torch.float64)
    W = torch.randn(3, 5, dtype=torch.float64)
    with_one = torch.cat([x, torch.ones(N, 2, 1, dtype=torch.float64)], 2)
    y = riding.apply(Dense(), x, W[:, :4], s, W[:, 4])
    torch.testing.assert_close(y, augmented.apply(Dense(), with_one, W, s))
    d = torch.randn(N, 2, 3, dtype=torch.float64)
    dx = augmented.input_gradient(Dense(), d, with_one, W, s)[..., :4]
    torch.testing.assert_close(riding.input_gradient(Dense(), d, x, W[:, :4], s), dx)


# --------------------------------------------------------------------------------------------------------- worth it?


@pytest.mark.parametrize(
    ("m", "parallel", "expected"),
    [
        (4, "auto", [N, N]),
        (6, "auto", [6] * 4),
        (6, True, [N, N]),
        (N, "auto", [N, N]),
        (4, False, [4] * 6),
    ],
)
def test_two_parts_run_one_after_the_other_on_a_cpu(
    m: int, parallel: bool | str, expected: list[int], rehearsed_once
) -> None:
    """Unless plain SAM gains by shared passes, which a convolutional net does not."""
    example = EXAMPLES["resnet"]
    model = example.model(torch.float32)
    opt = steppe.SAM(sgdm(model), 0.3, m=m, parallel=parallel)
    opt.step(example.batch(model, N, torch.float32))
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    opt.step(example.batch(model, N, torch.float32))  # rehearsed once more: a hook is new
    sizes.clear()
    opt.step(example.batch(model, N, torch.float32))
    hook.remove()
    assert sizes == expected
