"""The same small problem for every framework, and the plain loop that each must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import steppe

Make = Callable[[torch.optim.Optimizer], steppe.SharpnessAware]

METHODS: dict[str, Make] = {
    "SAM": lambda base: steppe.SAM(base, rho=0.1),
    "WSAM": lambda base: steppe.WSAM(base, rho=0.1, gamma=0.7),
    "USAM": lambda base: steppe.USAM(base, rho=0.1),  # not normalised: a wrong scale of g would show
    "FSAM": lambda base: steppe.FSAM(base, rho=0.1, sigma=0.5),  # has memory
    "LookSAM": lambda base: steppe.LookSAM(base, rho=0.1, k=2),
}
PASSES = {"SAM": 2, "WSAM": 2, "USAM": 2, "FSAM": 2, "LookSAM": 1.5}

Pair = tuple[Tensor, Tensor]


def reset_accelerate() -> None:
    """Forget the state that accelerate shares in a process, where it is installed."""
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError:
        return
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def digits(n: int) -> Pair:
    data = load_digits()
    return torch.tensor(data.data[:n] / 16, dtype=torch.float32), torch.tensor(data.target[:n])


def batches(n: int, size: int = 16) -> list[Pair]:
    """``n`` batches of real images, in order."""
    x, y = digits(n * size)
    return list(zip(x.split(size), y.split(size), strict=True))


class Net(nn.Module):
    """Small, with everything that a further pass could spoil: dropout, batch norm, and a count of forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
        )
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        return self.layers(x)


def llama() -> nn.Module:
    """A tiny language model, where transformers is installed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes, **tokens))


def grouped(items: Sequence[Pair], k: int) -> list[list[Pair]]:
    return [list(items[i : i + k]) for i in range(0, len(items), k)]


def plain_loop(
    model: nn.Module,
    optimizer: steppe.SharpnessAware,
    groups: list[list[Pair]],
    *,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> list[float]:
    """What the frameworks must agree with: ``step(closure)``, clipping in a pre-hook of the base."""
    if clip is not None:
        params = list(model.parameters())
        optimizer.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(params, clip) and None)
    losses = []
    for group in groups:

        def closure(group: list[Pair] = group) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros(())
            for x, y in group:
                with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
                    out = model(x)
                loss = criterion(out.float(), y) / len(group)
                (loss if scaler is None else scaler.scale(loss)).backward()
                total = total + loss.detach()
            return total

        losses.append(float(optimizer.step(closure, scaler=scaler)))
        if scaler is not None:
            scaler.update()
        if scheduler is not None and not optimizer.telemetry.was_skipped:
            scheduler.step()
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    """Weights and statistics, bit for bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())
