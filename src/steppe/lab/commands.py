"""The commands of the laboratory; they check everything that was asked before anything runs."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import steppe
from steppe.lab import measuring
from steppe.lab.console import publish, told
from steppe.lab.console import run as run_plan
from steppe.lab.doctor import doctor
from steppe.lab.recipes.commands import recipes, reproduce
from steppe.lab.running import EXAMPLES, run
from steppe.lab.sweep.commands import sweep

if TYPE_CHECKING:
    from steppe.lab.directory import Plan

app = typer.Typer(help="Sharpness-aware training: compare methods on real data.", no_args_is_help=True)
app.command()(recipes)
app.command()(reproduce)
app.command()(sweep)

Method = Annotated[
    list[str] | None,
    typer.Option(help="A method such as 'SAM(rho=0.2, m=16)' or 'SGD(epochs=2x)'; repeatable; without it, a survey."),
]
Baseline = Annotated[
    str | None, typer.Option(help="The method that others are compared to; the first where none is named.")
]
Seeds = Annotated[
    int | None,
    typer.Option(min=1, help="Seeds 0 to N-1 for each method.", show_default="5, fewer when quick or on images"),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steppe {steppe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sharpness-aware training: compare methods on real data."""


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="A source that `steppe doctor` lists, or module:function.")] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Folder that holds the data.")] = None,
    model: Annotated[str | None, typer.Option(help="Such as mlp-256-256, cnn-32 or resnet18-gn.")] = None,
    method: Method = None,
    baseline: Baseline = None,
    seeds: Seeds = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of every method that does not set its own.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate at the first step; cosine to 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="The base optimizer's weight decay.")] = None,
    noise: Annotated[float | None, typer.Option(help="Share of training labels redrawn from all classes.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Training examples, drawn anew for each seed.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: an accelerator where there is one.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/compare-DATA")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny version, some 20 seconds.")] = False,
) -> None:
    """Train one model with several methods over several seeds; record every run, print and write the comparison.

    The same command continues a directory; methods and seeds may be added to it.

    Examples:

        steppe compare --quick

        steppe compare --method 'SGD(epochs=2x)' --method 'SAM(rho=0.5)' --method 'WSAM(rho=0.5, gamma=0.9)' --seeds 10
    """
    given: dict[str, Any] = {
        "data_dir": None if data_dir is None else str(data_dir.resolve()),
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
    }
    given |= {"lr": lr, "weight_decay": weight_decay, "noise": noise, "train_size": train_size}
    folder = out or Path("runs") / f"compare-{data}{'-quick' if quick else ''}"
    console = Console()
    with told(console):
        from steppe.lab.place import Hardware

        hardware = Hardware(device=device, precision=precision)
        hardware.open()
        plan = _plan(data, quick, given, method, baseline, seeds)
        raise typer.Exit(run_plan(folder, plan, workers or os.cpu_count() or 1, console, hardware))


app.command(epilog=EXAMPLES)(run)
app.command()(doctor)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory of `steppe compare` or `steppe reproduce`.")],
    baseline: Baseline = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of the table.")] = False,
) -> None:
    """Rebuild a directory's report.html and summary.md, .csv and .tex from its records alone.

    Examples:

        steppe report runs/compare-digits

        steppe report runs/label_noise-laptop/noise-0.4 --baseline 'SAM(rho=0.5)' --json
    """
    console = Console()
    with told(console):
        found = publish(folder, baseline, console, quiet=as_json)
    if as_json:
        from steppe.lab.exports import plain

        typer.echo(json.dumps(plain(found), indent=1))


app.command()(measuring.measure)


def _plan(
    data: str, quick: bool, given: dict[str, Any], methods: list[str] | None, baseline: str | None, seeds: int | None
) -> "Plan":
    from steppe.lab import spec, tasks
    from steppe.lab.directory import Plan
    from steppe.lab.presets import preset, settings_for

    default = preset(data, quick)
    settings = settings_for(default, given)
    chosen = tuple(spec.parse_all(methods or list(default.methods), settings))
    plan = Plan(settings, chosen, seeds or default.seeds, None if baseline is None else spec.parse(baseline))
    tasks.check(settings)
    return plan
