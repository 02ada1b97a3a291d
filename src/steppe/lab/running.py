"""`steppe run`: one training run, in a directory that can be left and continued."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from steppe.lab.console import told

if TYPE_CHECKING:
    from steppe.lab.record import Record
    from steppe.lab.train import Run, Session

EXAMPLES = """Examples:

steppe run "SAM(rho=0.2)"

steppe run "WSAM(rho=0.1, gamma=0.9)" --data cifar10 --data-dir ~/data --noise 0.4 --device cuda --precision bf16

torchrun --nproc-per-node 8 --no-python steppe run "SAM(rho=0.05)" --data imagenet --data-dir /data/imagenet
"""


def run(
    method: Annotated[str, typer.Argument(help="A method such as 'SAM(rho=0.2, m=16)', SGD or AdamW.")],
    data: Annotated[str, typer.Option(help="A source that `steppe doctor` lists, or module:function.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data.")] = None,
    model: Annotated[str | None, typer.Option(help="mlp-256-256, resnet18-gn, wrn28-10, vit-s4, hf:FOLDER ...")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides split, noise, initial weights and order.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch, over all processes.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="The base of the method: sgd or adamw.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate after the warm-up; cosine to 0.")] = None,
    momentum: Annotated[float | None, typer.Option(help="SGD's momentum.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="The base optimizer's weight decay.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of a linear warm-up.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Share of the target spread over all classes.")] = None,
    augment: Annotated[str | None, typer.Option(help="auto, none, crop, crop-flip or resized-crop-flip.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of images, in pixels.")] = None,
    noise: Annotated[float | None, typer.Option(help="Share of training labels redrawn from all classes.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Training examples.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: an accelerator where there is one.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes on this node; torchrun sets it itself.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; torchrun sets it itself.")] = 1,
    strategy: Annotated[str, typer.Option(help="ddp or fsdp, for several processes.")] = "ddp",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; else one for an MLP.")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="1 epoch")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard events too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/DATA-METHOD-sSEED")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else.")] = False,
) -> None:
    """Train one model with one method on one task; the same command continues it, also after kill -9.

    The directory holds run.json, checkpoint.pt (at the end, the trained weights), metrics.jsonl and record.json.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name in ("model", "epochs", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "warmup")
        or name in ("label_smoothing", "augment", "image_size", "noise", "train_size")
    }
    given["data_dir"] = None if data_dir is None else str(data_dir.expanduser().resolve())
    console = Console(stderr=as_json)
    with told(console):
        import torch

        from steppe.lab import single
        from steppe.lab.place import Hardware

        asked = _asked(method, data, seed, given)
        hardware = Hardware(device, devices, nodes, strategy, precision)
        if threads or asked.settings.model.startswith("mlp"):  # small products wait for their threads
            torch.set_num_threads(threads or 1)
        folder = out or single.folder_of(asked)
        try:
            with Display(console, asked) as display:
                found = single.run(asked, folder, hardware, save_every, tensorboard, display)
        except KeyboardInterrupt:
            console.print(f"Stopped; the same command continues from {folder / 'checkpoint.pt'}.", soft_wrap=True)
            raise typer.Exit(130) from None
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        print(json.dumps(asdict(found))) if as_json else _tell(console, found, folder)


def _asked(method: str, data: str, seed: int, given: dict[str, Any]) -> "Run":
    """Check all that was asked before anything is written."""
    from steppe.lab import models, spec, tasks
    from steppe.lab.presets import preset, settings_for
    from steppe.lab.train import Run

    settings = settings_for(preset(data), given)
    models.check(settings.model)
    chosen = spec.parse_all([method], settings)[0]
    tasks.check(settings)
    return Run(chosen, seed, settings)


def _tell(console: Console, found: "Record", folder: Path) -> None:
    collapsed = ", collapsed" if found.collapsed else ""
    loss = "not finite" if found.train_loss is None else f"{found.train_loss:.4f}"
    line = f"{found.method} seed {found.seed}: test error {100 * found.test_error:.2f} %, training loss {loss}"
    console.print(
        f"{line}, {found.seconds:.1f} s{collapsed}; in {folder}", highlight=False, markup=False, soft_wrap=True
    )


class Display:
    """A bar with loss, error and time left; plain lines where there is no terminal."""

    def __init__(self, console: Console, run: "Run") -> None:
        self.console, self.epochs = console, run.epochs
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.bar = self.bars.add_task(f"{run.method} seed {run.seed}", total=None, note="")
        self.loss, self.error = "", ""

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()

    def __call__(self, session: "Session", line: dict[str, Any]) -> None:
        """Show a line of metrics."""
        if "loss" in line:
            self.loss = f", loss {line['loss']:.3f}"
        if "test_error" in line:
            self.error = f", test error {100 * line['test_error']:.1f} %"
            if not self.console.is_terminal:
                text = f"epoch {line['epoch']}/{self.epochs}{self.error}{self.loss}, {line['seconds']:.1f} s"
                self.console.print(text, markup=False, highlight=False)
        epoch = line["step"] * self.epochs // session.steps
        note = f"epoch {epoch}/{self.epochs}{self.loss}{self.error}"
        self.bars.update(self.bar, total=session.steps, completed=line["step"], note=note)
