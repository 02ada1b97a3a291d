"""Random models that mix examples, or do not: operations drawn one after the other, with branches and caches.

``python -m tests.random_programs FIRST LAST`` tries a range of seeds and prints what is wrong.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import steppe
from tests.cases import flat

D, CLASSES, STEPS = 4, 3, 4
Operation = Callable[["Program", Tensor, Random], Callable[[Tensor], Tensor]]


class Program(nn.Module):
    """A chain of operations on examples of shape ``(n, T, D)``; earlier values may be read again."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random, self.layers, self.values, self.step = Random(seed), nn.ModuleList(), [], 0
        self.scale = nn.Parameter(1 + 0.1 * torch.randn(D))
        self.register_buffer("cache", torch.zeros(D))
        self.alias = self.scale.detach()
        names = random.choices(list(OPERATIONS), weights=[w for w, _ in OPERATIONS.values()], k=random.randint(3, 8))
        self.names = ["dense", *names]
        self.operations = [OPERATIONS[name][1](self, random) for name in self.names]
        self.head = nn.Linear(D, CLASSES)

    def layer(self, module: nn.Module) -> nn.Module:
        self.layers.append(module)
        return module

    def forward(self, x: Tensor) -> Tensor:
        self.values = [x]
        for operation in self.operations:
            x = operation(x)
            self.values.append(x)
        return self.head(x.mean(1))


def dense(p: Program, random: Random):
    if random.random() < 0.3 and len(p.layers) and isinstance(p.layers[0], nn.Linear):
        return lambda x: torch.tanh(p.layers[0](x))  # a tied weight
    layer = p.layer(nn.Linear(D, D, bias=random.random() < 0.7))
    return lambda x: torch.tanh(layer(x))


def along_time(p: Program, random: Random):
    layer = p.layer(nn.Conv1d(D, D, 3, padding=1, groups=random.choice([1, 2])))
    return lambda x: torch.tanh(layer(x.mT).mT)


def attention(p: Program, random: Random):
    layer = p.layer(nn.Linear(D, 3 * D))

    def run(x: Tensor) -> Tensor:
        q, k, v = layer(x).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def norm(p: Program, random: Random):
    layer = p.layer(random.choice([nn.LayerNorm, nn.RMSNorm])(D))
    return lambda x: layer(x)


def batch_norm(p: Program, random: Random):
    options = {"affine": random.random() < 0.7, "momentum": random.choice([0.1, 0.4, None])}
    layer = p.layer(nn.BatchNorm1d(D, track_running_stats=random.random() < 0.8, **options))
    layer.train(random.random() < 0.9)
    return lambda x: layer(x.mT).mT


def recurrent(p: Program, random: Random):
    layer = p.layer(random.choice([nn.LSTM, nn.GRU, nn.RNN])(D, D, random.choice([1, 2]), batch_first=True))
    return lambda x: x + layer(x)[0]


def product(p: Program, random: Random):
    layer = p.layer(nn.Linear(D, D, bias=False))
    return random.choice(
        [
            lambda x: torch.einsum("btc,dc->btd", x, layer.weight).tanh(),
            lambda x: torch.tanh(x @ layer.weight.T),
            lambda x: F.linear(x, layer.weight / layer.weight.norm(dim=1, keepdim=True)),
            lambda x: F.linear(x, *layer.weight.chunk(1)).sin(),
            lambda x: F.bilinear(x, x.flip(1), layer.weight[None].expand(D, D, D)),
        ]
    )


def function_of_few(p: Program, random: Random):
    layer = p.layer(random.choice([nn.PReLU(), nn.PReLU(D), nn.LayerNorm(D)]))
    return random.choice(
        [
            lambda x: layer(x) if isinstance(layer, nn.LayerNorm) else layer(x.mT).mT,
            lambda x: x * layer.weight.reshape(1, 1, -1).sigmoid(),
            lambda x: torch.where(x > 0, x, layer.weight.exp() - 1),
            lambda x: torch.cat([layer.weight.mean().expand(len(x), 1, D), x], 1),
            lambda x: x + x.cumsum(1) * torch.exp(-layer.weight.abs().sum()),
        ]
    )


def turned(p: Program, random: Random):
    layer = p.layer(nn.ConvTranspose1d(D, D, 3, padding=1))
    return lambda x: torch.tanh(layer(x.mT).mT)


def drawn(p: Program, random: Random):
    """Random numbers of every kind, which change nothing: the loop draws others."""
    return random.choice(
        [
            lambda x: F.dropout(x, 0.0),
            lambda x: x + 0 * torch.randn(len(x), 1, D),
            lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(1.0),
            lambda x: x if torch.rand([]) < 2 else x.mean(0),
            lambda x: x + 0 * torch.rand_like(x),
            lambda x: x + 0 * torch.randn(D),
        ]
    )


def later(p: Program, random: Random):
    """From a step on that is not rehearsed."""
    layer = p.layer(nn.Linear(D, D))

    def unseen(x: Tensor) -> Tensor:
        with torch.no_grad():
            size = layer.weight.abs().mean()
        return x * size

    first, then = random.sample([lambda x: layer(x), lambda x: x * layer.bias.exp(), unseen, lambda x: x], 2)
    return lambda x: (then if p.step >= STEPS - 1 else first)(x)


def scaled(p: Program, random: Random):
    return random.choice([lambda x: x * p.scale, lambda x: x + p.scale, lambda x: x * p.scale.exp()])


def earlier(p: Program, random: Random):
    k, detached = random.randint(1, 3), random.random() < 0.5
    return lambda x: x + (lambda t: t.detach() if detached else t)(p.values[-min(k, len(p.values))])


def elementwise(p: Program, random: Random):
    f = random.choice([torch.relu, F.gelu, torch.sin, lambda x: x.clone().mul_(1.1).relu_(), lambda x: x.flip(1)])
    return lambda x: f(x)


def masked(p: Program, random: Random):
    own = random.random() < 0.5
    if own:  # by the example itself
        return lambda x: x * (x[:, :1, :1] > 0.1)
    return lambda x: x * (1 + 0.1 * (torch.arange(len(x)) % 2))[:, None, None]  # by its place in the batch


def experts(p: Program, random: Random):
    gate, both = p.layer(nn.Linear(D, 2)), [p.layer(nn.Linear(D, D)) for _ in range(2)]
    limited = random.random() < 0.5

    def run(x: Tensor) -> Tensor:
        weights = gate(x.mean(1)).softmax(-1)
        chosen = F.one_hot(weights.argmax(-1), 2).to(x)
        if limited:
            chosen = chosen * (chosen.cumsum(0) <= random_capacity * len(x))
        return x + sum(e(x) * (weights * chosen)[:, i, None, None] for i, e in enumerate(both))

    random_capacity = random.choice([0.3, 0.4])  # some are left out of every batch
    return run


def statistic(p: Program, random: Random):
    c, detached = 10.0 ** -random.randint(0, 6), random.random() < 0.6
    f = random.choice(
        [lambda t: t.mean(0), lambda t: t.std(0, unbiased=False), lambda t: t.amax(0), lambda t: t.abs().mean()]
    )
    return lambda x: x - c * (lambda t: t.detach() if detached else t)(f(x))


def groups(p: Program, random: Random):
    size, detached = random.choice([2, 3, 4]), random.random() < 0.6

    def run(x: Tensor) -> Tensor:
        means = [(part.detach() if detached else part).mean(0) for part in x.split(size)]
        return torch.cat([part - m for part, m in zip(x.split(size), means, strict=True)])

    return run


def permuted(p: Program, random: Random):
    c, shift = 10.0 ** -random.randint(0, 5), random.randint(1, 3)
    detached = random.random() < 0.5
    return lambda x: x + c * (lambda t: t.detach() if detached else t)(x.roll(shift, 0))


def across(p: Program, random: Random):
    c = 10.0 ** -random.randint(0, 4)
    return lambda x: x + c * (torch.softmax(x.mean(1) @ x.mean(1).T, -1) @ x.mean(1))[:, None]


def cached(p: Program, random: Random):
    rate, before = random.choice([0.5, 0.1, 1e-3]), random.random() < 0.5

    def run(x: Tensor) -> Tensor:
        old = p.cache.clone()
        with torch.no_grad():
            p.cache.lerp_(x.mean((0, 1)), rate)
        return x - (old if before else p.cache.clone())

    return run


def through_alias(p: Program, random: Random):
    return lambda x: x * p.alias.abs().mean()


def transformed(p: Program, random: Random):
    layer = p.layer(nn.Linear(D, D, bias=False))
    if random.random() < 0.5:
        return lambda x: (
            x * torch.func.grad(lambda W: F.linear(x.new_ones(1, D), W).square().sum())(layer.weight).norm().detach()
            + layer(x)
        )
    return lambda x: torch.vmap(lambda row: torch.tanh(F.linear(row, layer.weight)))(x)


OPERATIONS: dict[str, tuple[float, Operation]] = {
    **{f.__name__: (3.0, f) for f in (dense, along_time, attention, norm, scaled, earlier, elementwise)},
    **{f.__name__: (1.0, f) for f in (batch_norm, recurrent, product, function_of_few, turned, drawn)},
    **{f.__name__: (0.7, f) for f in (masked, experts, cached, later)},
    **{f.__name__: (0.5, f) for f in (statistic, groups, permuted, across, through_alias, transformed)},
}


def trial(seed: int) -> tuple[str, str]:
    """Train by shared passes and by the loop: ``shared``, ``loop``, or ``wrong``, and what the model does."""
    random = Random(seed)
    n, m, T = random.randint(6, 12), random.randint(1, 4), random.randint(2, 5)
    kinds = [steppe.SAM, steppe.SAM, steppe.WSAM, steppe.USAM]
    method, rho = random.choice(kinds), random.choice([0.05, 0.3])
    ends, did, calls = [], "loop", []
    for parallel in ("auto", False):
        torch.manual_seed(seed)
        model = Program(seed).double()
        model.alias = model.scale.detach()
        model.register_forward_pre_hook(lambda *_: calls.append(1))
        opt = method(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, m=m, parallel=parallel)
        what = f"seed {seed}, {method.__name__}, n {n}, m {m}: {' '.join(model.names)}"
        try:
            for model.step in range(STEPS):
                calls.clear()
                own = torch.Generator().manual_seed(seed + model.step)  # the model draws other numbers both ways
                x = torch.randn(n, T, D, dtype=torch.float64, generator=own)
                y = torch.randint(CLASSES, (n,), generator=own)
                opt.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y))
        except Exception as error:
            ends.append(type(error).__name__)
            continue
        did = "shared" if parallel and len(calls) == 2 else did
        buffers = [b.double().flatten() for b in model.buffers()]
        ends.append(torch.cat([flat(model), *buffers]))
    if isinstance(ends[0], str) or isinstance(ends[1], str):
        return ("raises" if type(ends[0]) is type(ends[1]) else "wrong"), f"{what}: {ends[0]} {ends[1]}"[:300]
    error = float((ends[0] - ends[1]).norm() / ends[1].norm())
    if all(end.isnan().any() for end in ends):
        return "raises", f"{what}: not a number, both ways"
    return (did if error < 1e-8 else "wrong"), f"{what}: {error:.1e}"


def main(first: int, last: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: Counter[str] = Counter()
    for seed in range(first, last):
        verdict, what = trial(seed)
        found[verdict] += 1
        if verdict in ("wrong", "raises"):
            print(verdict, what, flush=True)
        if seed % 100 == 99:
            print(seed + 1, dict(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
