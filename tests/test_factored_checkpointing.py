"""Activation checkpointing in shared passes: what is computed again has the perturbed weights of each micro-batch."""

import pytest
import torch
import torch.nn.functional as F
from benchmarks.memory import peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steppe
from tests.cases import flat, sgdm

N, D = 12, 8


class Block(nn.Module):
    """Attention, a matrix, a norm, a function of a parameter, dropout, drop path."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True, dropout=chance)
        self.scale, self.chance = nn.Parameter(torch.ones(D)), chance

    def forward(self, x: Tensor) -> Tensor:
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.chance)
        return x + kept * self.layer(x) * self.scale.exp()


class Net(nn.Module):
    def __init__(self, how: str, chance: float = 0.0, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(11, D), nn.ModuleList(Block(chance) for _ in range(depth))
        self.head, self.how = nn.Linear(D, 3), how

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index)
        for block in self.blocks:
            run = block
            if self.how == "nested":
                run = lambda x, block=block: checkpoint(block, x, use_reentrant=False).tanh()  # noqa: E731
            elif self.how == "two layers":  # all of their parameters stand before the end
                run = lambda x, block=block: block.layer.linear2(block.layer.linear1(x))  # noqa: E731
            x = run(x) if self.how == "none" else checkpoint(run, x, use_reentrant=self.how == "reentrant")
        return self.head(x.mean(1))


def cross_entropy(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


def batch(model: nn.Module, seed: int, length: int = 5) -> steppe.Batch:
    own = torch.Generator().manual_seed(seed)
    index, y = torch.randint(11, (N, length), generator=own), torch.randint(3, (N,), generator=own)
    return steppe.Batch(model, cross_entropy, (index, y))


def trained(how: str, parallel: bool | str, m: int = 3, method=steppe.SAM, chance: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    model = Net(how, chance).double()
    opt = method(sgdm(model), rho=0.3, m=m, parallel=parallel)
    for step in range(2):
        opt.step(batch(model, step))
    return flat(model)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("how", "m"), [("once", 1), ("once", 5), ("nested", 3), ("two layers", 3)])
def test_equals_the_serial_loop(how: str, m: int) -> None:
    torch.testing.assert_close(trained(how, True, m), trained(how, False, m), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", [steppe.WSAM, steppe.RWSAM])
def test_other_methods(method) -> None:
    torch.testing.assert_close(
        trained("once", True, method=method), trained("none", True, method=method), rtol=1e-10, atol=1e-10
    )


def test_draws_are_those_of_the_forward_pass() -> None:
    """With and without checkpointing the step is the same, to the last dropout mask."""
    found = [trained(how, True, chance=0.4) for how in ("once", "none")]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_the_reentrant_kind_runs_in_the_loop_and_says_what_to_do() -> None:
    model = Net("reentrant").double()
    with pytest.warns(UserWarning, match=r"under checkpoint\(use_reentrant=True\)"):
        steppe.SAM(sgdm(model), rho=0.3, m=3).step(batch(model, 0))


@pytest.mark.usefixtures("rehearsed_once")
def test_takes_less_memory() -> None:
    peaks = {}
    for how in ("once", "none"):
        torch.manual_seed(0)
        model = Net(how, depth=8)
        opt = steppe.SAM(sgdm(model), rho=0.3, m=4, parallel=True)
        opt.step(batch(model, 0, length=64))
        peaks[how] = peak(lambda opt=opt, model=model: opt.step(batch(model, 0, length=64)), torch.device("cpu"))
    assert peaks["once"] < 0.5 * peaks["none"]


def test_a_whole_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=11, num_key_value_heads=2, pad_token_id=0, use_cache=False, **sizes)

    def next_token(model: nn.Module, index: Tensor) -> Tensor:
        return F.cross_entropy(model(input_ids=index).logits[:, :-1].mT, index[:, 1:], reduction="none").mean(1)

    found, checkpointed = [], False
    for parallel in (True, False):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().train()
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        checkpointed = checkpointed or any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        opt = steppe.SAM(sgdm(model), rho=0.3, m=3, parallel=parallel)
        for step in range(2):
            opt.step(steppe.Batch(model, next_token, batch(model, step).data[0]))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert checkpointed
