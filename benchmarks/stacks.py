"""What a sharpness-aware update costs in each training stack, against the same stack with the base optimizer.

    python -m benchmarks.stacks

CPU time of the process, which other processes do not lengthen much; stacks and optimizers take turns in every round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning
import torch
import transformers
from accelerate import Accelerator
from torch import nn

import steppe
from benchmarks import record
from benchmarks.models import sgd
from steppe.integrations.accelerate import Backward
from steppe.integrations.huggingface import SharpnessAwareTrainer
from steppe.integrations.lightning import SharpnessAwareMixin

RECORD = Path(__file__).parent / "records" / "stacks" / "cpu.json"
PAGE = Path(__file__).parents[1] / "docs" / "stacks" / "README.md"
UPDATES, ROUNDS, BATCH = 60, 5, 256
SETTINGS = {"model": "MLP 64-1024-1024-10", "batch": BATCH, "updates": UPDATES, "rounds": ROUNDS, "base": "SGD"}


class Net(nn.Module):
    """As the Trainer wants it; the others take the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss in a dictionary."""
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Data(torch.utils.data.Dataset):
    """Numbers at random."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        n = UPDATES * BATCH
        self.x, self.labels = torch.randn(n, 64, generator=g), torch.randint(10, (n,), generator=g)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[i], "labels": self.labels[i]}


Make = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


def plain(make: Make, data: Data) -> None:
    """A loop of one's own."""
    model = Net()
    optimizer = make(sgd(model))

    def closure(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        return loss

    for batch in torch.utils.data.DataLoader(data, BATCH):
        optimizer.step(partial(closure, batch))


def accelerate(make: Make, data: Data) -> None:
    """accelerate's loop."""
    accelerator = Accelerator(cpu=True)
    model = Net()
    model, optimizer, loader = accelerator.prepare(model, make(sgd(model)), torch.utils.data.DataLoader(data, BATCH))
    sharp = isinstance(optimizer.optimizer, steppe.SharpnessAware)
    backward = Backward(accelerator, model, optimizer, lambda m, b: m(**b)["loss"]) if sharp else None
    for batch in loader:
        with accelerator.accumulate(model):
            if backward is None:
                accelerator.backward(model(**batch)["loss"])
            else:
                backward(batch)
            optimizer.step()
            optimizer.zero_grad()


def trainer(make: Make, data: Data) -> None:
    """The Hugging Face Trainer."""
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        max_steps=UPDATES,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = Net()
    optimizer = make(sgd(model))
    sharp = isinstance(optimizer, steppe.SharpnessAware)
    kind = SharpnessAwareTrainer if sharp else transformers.Trainer
    kind(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()


class Module(SharpnessAwareMixin, lightning.LightningModule):
    """The net in Lightning."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net, self.make = Net(), make

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss."""
        return self.net(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The base, or steppe's."""
        return self.make(sgd(self))


def fit(make: Make, data: Data) -> None:
    """Lightning's trainer."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    runner = lightning.Trainer(max_epochs=1, accelerator="cpu", **dict.fromkeys(quiet, False))
    runner.fit(Module(make), torch.utils.data.DataLoader(data, BATCH))


STACKS = {"a loop of your own": plain, "accelerate": accelerate, "Hugging Face Trainer": trainer, "Lightning": fit}
KINDS: dict[str, Make] = {"base": lambda base: base, "SAM": lambda base: steppe.SAM(base, rho=0.05)}


def measure() -> list[dict]:
    """A row a stack: the median CPU time of an update in ms, by optimizer, and the ratios of all rounds."""
    data = Data()
    times: dict[str, dict[str, list[float]]] = {stack: {kind: [] for kind in KINDS} for stack in STACKS}
    for i in range(ROUNDS + 1):
        for stack, train in STACKS.items():
            for kind, make in KINDS.items():
                start = time.process_time()
                train(make, data)
                if i:  # the first round warms up
                    times[stack][kind].append((time.process_time() - start) / UPDATES * 1e3)
    rows = []
    for stack, by_kind in times.items():
        ratios = sorted(s / b for s, b in zip(by_kind["SAM"], by_kind["base"], strict=True))
        medians = {f"{kind}_ms": round(statistics.median(t), 2) for kind, t in by_kind.items()}
        rows.append({"stack": stack, **medians, "ratio": [round(r, 2) for r in ratios]})
    return rows


def table(rows: list[dict]) -> str:
    """The table of docs/stacks/README.md."""
    lines = ["| stack | base, ms | SAM, ms | ratio: median (least to most) |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        ratio = row["ratio"]
        spread = f"{statistics.median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f})"
        lines.append(f"| {row['stack']} | {row['base_ms']} | {row['SAM_ms']} | {spread} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page with the table of the committed record."""
    begin, end = "<!-- stacks: begin -->\n", "\n<!-- stacks: end -->"
    head, rest = text.split(begin)
    return head + begin + table(record.read(RECORD)["rows"]) + end + rest.split(end.lstrip())[-1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record.write(RECORD, "stacks", torch.device("cpu"), SETTINGS, measure())
    PAGE.write_text(with_table(PAGE.read_text()))
