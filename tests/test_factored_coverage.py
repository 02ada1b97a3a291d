"""Shared passes through what people build from: functions of parameters, recurrent layers, dropout, drop path."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import steppe
from tests.cases import flat, sgdm

N, CLASSES = 8, 4
SHAPES = {"vectors": (6,), "sequences": (5, 6), "images": (3, 6, 6)}


class Of(nn.Module):
    """``forward(module, x)`` with some modules and parameters."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.f = forward
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def free(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.5)


def image_head(self, x: Tensor) -> Tensor:
    """Average the positions, and pad the channels to six."""
    x = x.mean((2, 3))
    return self.head(F.pad(x, (0, 6 - x.shape[1])))


VECTORS = {
    "PReLU": lambda: Of(lambda s, x: s.head(s.act(s.body(x))), act=nn.PReLU()),
    "Bilinear": lambda: Of(lambda s, x: s.head(s.two(x, s.body(x))), two=nn.Bilinear(6, 6, 6)),
    "weight norm": lambda: Of(lambda s, x: s.head(s.normed(x).tanh()), normed=weight_norm(nn.Linear(6, 6))),
    "a function of a scalar": lambda: Of(lambda s, x: s.head(s.body(x)) * s.t.exp(), t=free()),
    "a gate": lambda: Of(lambda s, x: s.head(s.body(x) * torch.sigmoid(s.t)), t=free(6)),
    "a chain": lambda: Of(
        lambda s, x: s.head(s.body(x) * (1 + s.t.to(x.dtype).view(1, 6) * s.u.abs())), t=free(6), u=free(6)
    ),
    "where": lambda: Of(lambda s, x: s.head(torch.where(x > 0, s.body(x), s.p)), p=free(6)),
    "cosine": lambda: Of(lambda s, x: F.normalize(s.body(x)) @ F.normalize(s.w).T, w=free(CLASSES, 6)),
    "a transpose": lambda: Of(lambda s, x: F.linear(s.body(x) @ s.w.T, s.v.t()), w=free(5, 6), v=free(5, CLASSES)),
    "addmm": lambda: Of(lambda s, x: torch.addmm(s.b, s.body(x), s.w, alpha=2.0), b=free(CLASSES), w=free(6, CLASSES)),
    "by keyword": lambda: Of(lambda s, x: F.linear(bias=s.b, weight=s.w, input=x), b=free(CLASSES), w=free(CLASSES, 6)),
    "parts of a weight": lambda: Of(lambda s, x: F.linear(F.linear(x, *s.halves(0)), *s.halves(1)), **packed()),
    "a power": lambda: Of(lambda s, x: s.head(x.abs().add(0.1).pow(s.p)), p=nn.Parameter(torch.tensor([1.5]))),
    "a weight used twice": lambda: Of(lambda s, x: s.head(s.body(x) * s.body.bias.exp())),
}

SEQUENCES = {
    "LSTM": lambda: Of(lambda s, x: s.head(s.r(x)[0].mean(1)), r=nn.LSTM(6, 6, batch_first=True)),
    "GRU": lambda: Of(
        lambda s, x: s.head(s.r(s.body(x).transpose(0, 1))[0].mean(0)), r=nn.GRU(6, 3, 2, bidirectional=True)
    ),
    "RNN": lambda: Of(lambda s, x: s.head(s.r(x)[1][-1]), r=nn.RNN(6, 6, batch_first=True)),
    "einsum": lambda: Of(lambda s, x: s.head(torch.einsum("btc,dc->btd", s.body(x), s.w).mean(1)), w=free(6, 6)),
    "experts": lambda: Of(lambda s, x: s.head(torch.einsum("btc,ecd->bted", x, s.w).mean((1, 2))), w=free(3, 6, 6)),
    "a product from the left": lambda: Of(lambda s, x: s.head((s.w @ s.body(x)).mean(1)), w=free(4, 5)),
    "interpolated positions": lambda: Of(
        lambda s, x: s.head((s.body(x) + F.interpolate(s.p, size=5).mT).mean(1)), p=free(1, 6, 3)
    ),
    "a decay": lambda: Of(lambda s, x: s.head((x * torch.exp(-torch.exp(s.a))).cumsum(1).mean(1)), a=free(6)),
    "a repeated prompt": lambda: Of(
        lambda s, x: s.head(torch.cat([s.p.repeat(len(x), 1, 1), x], 1).mean(1)), p=free(2, 6)
    ),
    "an expanded prompt": lambda: Of(
        lambda s, x: s.head(torch.cat([s.p.unsqueeze(0).expand(len(x), -1, -1), s.body(x)], 1).mean(1)), p=free(2, 6)
    ),
    "a bias of attention": lambda: Of(
        lambda s, x: s.head(F.scaled_dot_product_attention(s.body(x), x, x, attn_mask=s.b[s.i] * 2).mean(1)),
        b=free(9),
        i=(torch.arange(5)[:, None] - torch.arange(5)).abs(),
    ),
}

IMAGES = {
    "PReLU of channels": lambda: Of(lambda s, x: image_head(s, s.act(s.c(x))), c=nn.Conv2d(3, 4, 3), act=nn.PReLU(4)),
    "ConvTranspose2d": lambda: Of(
        lambda s, x: image_head(s, s.up(x).relu()),
        up=nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
    ),
    "a reshaped scale": lambda: Of(
        lambda s, x: image_head(s, s.c(x) * s.g.reshape(1, -1, 1, 1)), c=nn.Conv2d(3, 4, 3), g=free(4)
    ),
    "standardised weights": lambda: Of(
        lambda s, x: image_head(s, F.conv2d(x, (s.w - s.w.mean((1, 2, 3), True)) / s.w.std((1, 2, 3), keepdim=True))),
        w=free(4, 3, 3, 3),
    ),
    "weight norm of a convolution": lambda: Of(
        lambda s, x: image_head(s, s.c(x).relu()), c=weight_norm(nn.Conv2d(3, 4, 3), dim=1)
    ),
}
CASES = [
    *(pytest.param(make, "vectors", id=name) for name, make in VECTORS.items()),
    *(pytest.param(make, "sequences", id=name) for name, make in SEQUENCES.items()),
    *(pytest.param(make, "images", id=name) for name, make in IMAGES.items()),
]


def packed() -> dict:
    w, b = free(12, 6), free(12)
    halves = lambda i: (w.chunk(2)[i], b[:6]) if i == 0 else (w.chunk(2)[1][:CLASSES], None)  # noqa: E731
    return {"w": w, "b": b, "halves": halves}


def trained(make, kind: str, m: int, parallel: bool | str, steps: int = 3, rule=steppe.SAM) -> torch.Tensor:
    """The weights after some steps."""
    torch.manual_seed(0)
    model = make().double()
    if hasattr(model, "halves"):  # they belong to this model
        model.halves = lambda i: (model.w.chunk(2)[i], model.b[:6]) if i == 0 else (model.w.chunk(2)[1][:CLASSES], None)
    opt = rule(sgdm(model), rho=0.3, m=m, parallel=parallel)
    for _ in range(steps):
        x = torch.randn(N, *SHAPES[kind], dtype=torch.float64)
        loss = nn.CrossEntropyLoss(reduction="none")
        opt.step(steppe.Batch.supervised(model, loss, x, torch.randint(CLASSES, (N,))))
    assert opt.telemetry.forwards == 2
    return flat(model)


@pytest.mark.parametrize("m", [1, 2, 3])
@pytest.mark.parametrize(("make", "kind"), CASES)
def test_equals_the_serial_loop(make, kind: str, m: int) -> None:
    torch.testing.assert_close(trained(make, kind, m, True), trained(make, kind, m, False), rtol=1e-10, atol=1e-10)


def bag(**options) -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(11, 6, **options), nn.Linear(6, CLASSES))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 6)

    def forward(self, index: Tensor) -> Tensor:
        return (self.tokens(index).tanh() @ self.tokens.weight.T).mean(1)[:, :CLASSES]


class Relative(nn.Module):
    """A table of biases for the distance of two positions, as in T5; as many positions as examples, or twice."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.tokens, self.bias, self.head = nn.Embedding(11, 6), nn.Embedding(2 * length, 2), nn.Linear(6, CLASSES)
        self.length = length

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index.repeat(1, self.length)[:, : self.length])
        at = torch.arange(self.length)
        bias = self.bias(at[:, None] - at + self.length).permute(2, 0, 1)[None]
        q = x.unflatten(2, (2, 3)).transpose(1, 2)
        return self.head(((q @ q.mT + bias).softmax(-1) @ q).transpose(1, 2).flatten(2).mean(1))


class Positions(nn.Module):
    """Positions in a buffer, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.head = nn.Embedding(11, 6), nn.Embedding(5, 6), nn.Linear(6, CLASSES)
        self.register_buffer("ids", torch.arange(5)[None])

    def forward(self, index: Tensor) -> Tensor:
        return self.head((self.tokens(index) + self.positions(self.ids)).tanh().mean(1))


INDICES = {
    "mean of a bag": bag,
    "sum of a bag": lambda: bag(mode="sum", padding_idx=2),
    "padded mean of a bag": lambda: bag(padding_idx=-3),
    "a tied head": Tied,
    "positions in a buffer": Positions,
    **{f"relative positions {length}": lambda length=length: Relative(length) for length in (5, N, 2 * N)},
}


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("name", INDICES)
def test_lookups_equal_the_serial_loop(name: str, m: int) -> None:
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        model = INDICES[name]().double()
        opt = steppe.SAM(sgdm(model), rho=0.3, m=m, parallel=parallel)
        for _ in range(3):
            data = torch.randint(11, (N, 5)), torch.randint(CLASSES, (N,))
            opt.step(steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), *data))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), *[1] * (x.dim() - 1)).bernoulli_(0.7) if self.training else x


CHANCE = {
    "drop path": lambda: Of(lambda s, x: s.head((x + s.drop(s.body(x))).mean(1)), drop=DropPath()),
    "noise": lambda: Of(lambda s, x: s.head((s.body(x) + torch.randn(len(x), 1, 6, dtype=x.dtype)).mean(1))),
    "attention": lambda: Of(
        lambda s, x: s.head(s.a(x, x, x)[0].mean(1)), a=nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
    ),
    "an encoder layer": lambda: Of(
        lambda s, x: s.head(s.layer(x).mean(1)), layer=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    ),
    "LSTM": lambda: Of(lambda s, x: s.head(s.r(x)[0].mean(1)), r=nn.LSTM(6, 6, 2, batch_first=True, dropout=0.5)),
}


@pytest.mark.parametrize("name", CHANCE)
def test_chance_does_not_keep_a_model_from_sharing(name: str) -> None:
    """Both passes draw the same numbers: at a radius of nearly 0 they have the same loss."""
    torch.manual_seed(0)
    model = CHANCE[name]().double()
    x, y = torch.randn(N, 5, 6, dtype=torch.float64), torch.randint(CLASSES, (N,))
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), x, y)
    opt = steppe.SAM(sgdm(model), rho=1e-9, m=2, parallel=True)
    seen = []
    for _ in range(3):
        opt.step(batch)
        assert opt.telemetry.loss == pytest.approx(float(opt.telemetry.loss_adv), rel=1e-7)
        seen.append(float(opt.telemetry.loss))
    assert abs(seen[1] - seen[2]) > 1e-4  # other numbers in another step


REFUSED = {
    "spectral norm": (lambda: Of(lambda s, x: s.head(s.l(x)), l=spectral_norm(nn.Linear(6, 6))), "works in place"),
    "a number": (lambda: Of(lambda s, x: s.head(x) * s.t.item(), t=free()), "not as a tensor"),
    "other rows": (lambda: Of(lambda s, x: s.head(s.body(x)[x[:, 0] > 0].sum(0) * s.t.exp() + x), t=free(6)), "."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    make, why = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    data = torch.randn(N, 6), torch.randint(CLASSES, (N,))
    batch = steppe.Batch.supervised(model, nn.CrossEntropyLoss(reduction="none"), *data)
    with pytest.raises(ValueError, match=why):
        steppe.SAM(sgdm(model), rho=0.3, m=2, parallel=True).step(batch)
