"""The pages on stacks that need no framework: their code runs, and so does what their diffs lead to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import steppe
from tests.test_docs import run

STACKS = Path(__file__).parents[1] / "docs" / "stacks"
DIFFS = re.findall(r"^```diff\n(.*?)^```", (STACKS / "migration.md").read_text(), re.DOTALL | re.MULTILINE)[1:]


@pytest.mark.parametrize("page", ["migration", "mixed-precision", "distributed"])
def test_code_on_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):  # the page sets them
        monkeypatch.setenv(name, "")
    run(STACKS / f"{page}.md")


def side(diff: str, without: str) -> str:
    """The lines of one side of a diff: without those that begin with "+", or with "-"."""
    return "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(without))


class Trainer:
    """Calls ``step`` as Composer's Trainer: the closure takes options, and returns a number."""

    def __init__(self, model, train_dataloader, optimizers, max_duration) -> None:
        self.model, self.loader, self.optimizer = model, train_dataloader, optimizers
        self.passes = 0

    def fit(self) -> None:
        for batch in self.loader:
            total = {"loss/train/total": torch.zeros(1)}
            self.optimizer.step(closure=lambda loss_dict=total, batch=batch, **kw: self._train(batch, loss_dict).item())

    def _train(self, batch: tuple[Tensor, Tensor], total: dict[str, Tensor]) -> Tensor:
        self.passes += 1
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()
        total["loss/train/total"] += loss.detach()
        return loss.detach()


def script() -> dict[str, object]:
    """The names that the scripts take from elsewhere."""
    torch.manual_seed(0)
    x, y = torch.randn(160, 20), torch.randint(5, (160,))
    return {
        "torch": torch,
        "steppe": steppe,
        "Trainer": Trainer,
        "model": nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)),
        "criterion": nn.CrossEntropyLoss(),
        "loader": list(zip(x.split(8), y.split(8), strict=True)),
        "mixup": lambda x, y: (0.3 * x.flip(0) + 0.7 * x, y),
    }


@pytest.mark.parametrize(
    ("diff", "passes"), list(zip(DIFFS, (40, 40, 22), strict=True)), ids=["sam.py", "pytorch_optimizer", "Composer"]
)
def test_what_the_diff_leads_to_trains(diff: str, passes: int) -> None:
    compile(side(diff, "+"), "before", "exec")
    names = script()
    model, criterion, loader = names["model"], names["criterion"], names["loader"]
    forwards: list[None] = []
    model.register_forward_hook(lambda *_: forwards.append(None))

    def loss(of: Callable[[Tensor], Tensor] = model) -> float:
        return float(sum(criterion(of(x), y).detach() for x, y in loader)) / len(loader)

    before = loss()
    forwards.clear()
    exec(compile(side(diff, "-"), "after", "exec"), names)
    assert len(forwards) == passes  # two a step, or one more for every tenth step
    assert loss() < before
