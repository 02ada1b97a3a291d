"""``steppe run`` and ``doctor``."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steppe.lab.commands import names
from steppe.lab.commands.names import completed
from steppe.lab.commands.options import AsJSON, Data, Device, OwnTask, Precision, source_of, with_settings
from steppe.lab.terminal import Display, line

if TYPE_CHECKING:
    from steppe.lab.train import Session

OneMethod = Annotated[
    str,
    typer.Argument(
        help="A method such as 'SAM(rho=0.2, m=16)', SGD or AdamW.", autocompletion=completed(names.METHODS)
    ),
]
Strategy = Annotated[
    str, typer.Option(help="ddp or fsdp, for several processes.", autocompletion=completed(names.STRATEGIES))
]


@with_settings
def run(
    method: OneMethod,
    given: dict[str, Any],
    data: Data = "digits",
    task: OwnTask = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides split, noise, initial weights and order.")] = 0,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes on this node; torchrun sets it itself.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; torchrun sets it itself.")] = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; else one for an MLP.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; else an epoch.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/DATA-METHOD-sSEED")] = None,
    as_json: AsJSON = False,
) -> None:
    r"""Train one model with one method on one task.

    The same command continues it, also after kill -9.

    Examples:

        steppe run 'SAM(rho=0.2)'
        steppe run 'WSAM(rho=0.1, gamma=0.9)' --data cifar10 --noise 0.4
        torchrun --nproc-per-node 8 --no-python \
            steppe run 'SAM(rho=0.05)' --data cifar10 --data-dir ~/data
    """
    import torch

    from steppe.lab import presets, single
    from steppe.lab.hardware import Hardware
    from steppe.lab.record import told

    asked = presets.planned(source_of(data, task), given, [method], seeds=1, first=seed).runs()[0]
    hardware = Hardware(device, devices, nodes, strategy, precision).chosen(asked.settings.model)
    if threads or asked.settings.model.startswith("mlp"):  # small products wait for their threads
        torch.set_num_threads(threads or 1)
    console, folder = Console(stderr=as_json), out or single.folder_of(asked)
    with Display(console, str(asked)) as display:
        found = single.run(asked, folder, hardware, save_every, _watch(display))
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
        return
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        loss = "not finite" if found.train_loss is None else f"{found.train_loss:.4f}"
        result = f"test {told(found.metric, found.test_error)}, training loss {loss}, {found.seconds:.1f} s"
        line(console, f"{asked}: {result}{', collapsed' if found.collapsed else ''}; in {folder}")


def _watch(display: Display) -> "Callable[[Session, dict[str, Any]], None]":
    """Return what shows the metrics of a run on a display."""
    from steppe.lab.own import metrics as measured
    from steppe.lab.record import told

    seen: dict[str, Any] = {}

    def watch(session: "Session", metrics: dict[str, Any]) -> None:
        seen.update(metrics)
        step, epochs = metrics["step"], session.run.epochs
        note = f"epoch {step * epochs // session.steps}/{epochs}"
        if seen.get("test_error") is not None:
            note += f", test {told(measured(session.task.own)[1], seen['test_error'])}"
        note += f", loss {seen['loss']:.3f}" if "loss" in seen else ""
        display.update(step, session.steps, note)
        if "test_error" in metrics:
            display.line(f"{note}, {metrics['seconds']:.1f} s", always=False)

    return watch


def doctor(as_json: AsJSON = False) -> None:
    """Show the environment, devices, optional packages and data, and how to get those that are missing.

    Data are looked for in $STEPPE_DATA (./data if it is not set), then in the folders of system packages.
    """
    from steppe.lab.doctor import checks

    if as_json:
        print(json.dumps([asdict(check) for check in checks()], indent=1))
        return
    shown = Table(box=None, padding=(0, 1), pad_edge=False)
    for header in ("", "", "found", "", "what to do"):
        shown.add_column(header, overflow="fold")
    for check in checks():
        shown.add_row(check.kind, check.name, "yes" if check.found else "no", check.detail, check.hint)
    Console().print(shown)
