"""The commands of the laboratory; they check everything that was asked before anything runs."""

import os
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steppe
from steppe.lab import measuring
from steppe.lab.console import told
from steppe.lab.doctor import doctor
from steppe.lab.running import EXAMPLES, run

if TYPE_CHECKING:
    from steppe.lab.directory import Plan
    from steppe.lab.place import Hardware
    from steppe.lab.summary import Summary

_SHORT = {"difference": "diff.", "seconds": "s"}  # headers that a terminal of 80 columns has no room for

app = typer.Typer(
    help="Sharpness-aware training: compare methods on real data.", no_args_is_help=True, add_completion=False
)

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
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/compare-DATA")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny version, some 20 seconds.")] = False,
) -> None:
    """Train one model with several methods over several seeds; record every run, print and write the comparison.

    The same command continues a directory; methods and seeds may be added to it.
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
        raise typer.Exit(_run(folder, plan, workers or os.cpu_count() or 1, hardware, console))


app.command(epilog=EXAMPLES)(run)
app.command()(doctor)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run directory of `steppe compare`.")],
    baseline: Baseline = None,
) -> None:
    """Rebuild a directory's report and summary from its records alone."""
    console = Console()
    with told(console):
        _publish(folder, baseline, console)


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


def _run(folder: Path, asked: "Plan", workers: int, hardware: "Hardware", console: Console) -> int:
    """Run what is missing and report; return the exit code."""
    from steppe.lab import directory
    from steppe.lab.compare import compare
    from steppe.lab.progress import Display

    whole = directory.open_for(folder, asked)
    known, _ = directory.finished(folder, whole)
    runs = [run for run in asked.runs() if run not in known]
    done = len(asked.runs()) - len(runs)
    console.print(f"{len(runs)} runs to do, {done} already in {folder}", highlight=False, soft_wrap=True)
    failures = []
    try:
        if runs:
            with Display(console, runs) as display:
                failures = compare(folder, runs, workers, display, hardware)
    except (KeyboardInterrupt, BrokenExecutor) as error:
        lost = isinstance(error, BrokenExecutor)
        kept = f"{len(directory.finished(folder, whole)[0])} of {len(whole.runs())} runs are kept in {folder}"
        why = "A worker process was lost, killed for memory perhaps" if lost else "Stopped"
        console.print(f"{why}. {kept}; the same command continues.", highlight=False, soft_wrap=True)
        return 1 if lost else 130
    _publish(folder, None, console)
    for failure in failures:
        console.print(
            f"\n{failure.run.method} seed {failure.run.seed} failed: {failure.reason}", style="red", markup=False
        )
        console.print(failure.details, markup=False, highlight=False)
    return 1 if failures else 0


def _publish(folder: Path, baseline: str | None, console: Console) -> None:
    from steppe.lab import report as page

    with console.status("writing the report"):
        found = page.write(folder, baseline)
    _print(found, console)
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _print(found: "Summary", console: Console) -> None:
    from steppe.lab import summary

    headers, lines = summary.table(found)
    table = Table(title=summary.title(found), caption=summary.caption(found), caption_justify="left")
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    for i, header in enumerate(headers):
        table.add_column(_SHORT.get(header, header), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for cells in lines:
        table.add_row(*map(Text, cells))
    console.print(table)
    for note in summary.notes(found):
        console.print(f"- {note}", markup=False, highlight=False)
