"""A loop like nanoGPT's on two ranks: DDP around a compiled model, accumulation, clipping, a warm-up of the rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import steppe

ACCUMULATED, STEPS = 2, 3


class GPT(nn.Module):
    """One block, whose head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1337)
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(8, 16)
        self.norm, self.attention, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.after, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        q, k, v = self.attention(self.norm(x)).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.after(x))))
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def texts(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
    return ids[:, :-1], ids[:, 1:]


def loop(rank: int | None, make, *, idiom: bool = True) -> list[Tensor]:
    """Train on this rank's texts, or on all of them without ranks."""
    raw = GPT().double()
    model: nn.Module = torch.compile(raw, backend="aot_eager")
    optimizer = make(torch.optim.AdamW(raw.parameters(), lr=1e-2))
    ranks = range(2) if rank is None else [rank]
    if rank is not None:
        model = DistributedDataParallel(model)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / STEPS

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), dtype=torch.float64)
            for micro in range(ACCUMULATED):
                if rank is not None and idiom:
                    model.require_backward_grad_sync = micro == ACCUMULATED - 1
                data = [torch.cat(part) for part in zip(*(texts(step, micro, r) for r in ranks), strict=True)]
                loss = model(*data)[1] / ACCUMULATED
                loss.backward()
                total += loss.detach()
            return total

        if isinstance(optimizer, steppe.SharpnessAware):
            optimizer.backward(closure)
        else:
            closure()
        nn.utils.clip_grad_norm_(raw.parameters(), 0.5)
        optimizer.step()
    return [p.detach() for p in raw.parameters()]


def plain(base):
    return base


def sam(rho: float, sync: str):
    return lambda base: steppe.SAM(base, rho=rho, sync=sync)


def run(rho: float | None, sync: str, idiom: bool) -> list[Tensor]:
    make = plain if rho is None else sam(rho, sync)
    return loop(torch.distributed.get_rank(), make, idiom=idiom)


@pytest.mark.parametrize("idiom", [True, False], ids=["sync in the last micro-batch", "sync in each"])
def test_a_radius_of_0_is_the_plain_loop_bit_for_bit(idiom: bool, two_ranks) -> None:
    for sync in ("local", "global"):
        ours, theirs = two_ranks(run, 0.0, sync, idiom), two_ranks(run, None, sync, idiom)
        for p, q, r, s in zip(*ours, *theirs, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(p, r)
            assert torch.equal(r, s)


def test_one_perturbation_for_both_ranks_is_one_process_with_all_texts(two_ranks) -> None:
    first, second = two_ranks(run, 0.1, "global", True)
    for p, q, expected in zip(first, second, loop(None, sam(0.1, "global")), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-12)


def test_a_rank_s_own_perturbation_is_the_same_with_and_without_the_idiom(two_ranks) -> None:
    shared = two_ranks(run, 0.1, "global", True)[0]
    with_it, without = two_ranks(run, 0.1, "local", True), two_ranks(run, 0.1, "local", False)
    for p, q, r, s in zip(*with_it, *without, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(r, s)
        torch.testing.assert_close(p, r, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(with_it[0][0], shared[0], rtol=1e-9)
