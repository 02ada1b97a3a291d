"""``steppe run``, ``compare``, ``report``, ``measure`` and ``doctor``."""

import json
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steppe.lab.settings import Settings
from steppe.lab.terminal import Display, line, show, table

if TYPE_CHECKING:
    from steppe.lab.hardware import Hardware
    from steppe.lab.runs import Plan
    from steppe.lab.train import Session

Data = Annotated[str, typer.Option(help="A source that `steppe doctor` lists, or module:function.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: an accelerator if there is one.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
Baseline = Annotated[str | None, typer.Option(help="The method that others are compared to.", show_default="the first")]
Folder = Annotated[Path, typer.Argument(help="A run directory of any command.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an option for each setting that has one; it gets their values as the dict ``given``."""
    settings = {one.name: one for one in fields(Settings) if one.metadata.get("option")}

    @wraps(command)
    def wrapped(**options: Any) -> None:
        command(given={name: options.pop(name) for name in settings}, **options)

    kept = [one for one in signature(command).parameters.values() if one.name != "given"]
    for name, one in settings.items():
        kind: Any = one.type
        option = Annotated[kind | None, typer.Option(help=one.metadata["option"])]
        kept.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option))
    wrapped.__signature__ = Signature(kept)  # type: ignore[attr-defined] # what Typer reads
    wrapped.__annotations__ = {one.name: one.annotation for one in kept}
    return wrapped


@_with_settings
def run(
    method: Annotated[str, typer.Argument(help="A method such as 'SAM(rho=0.2, m=16)', SGD or AdamW.")],
    given: dict[str, Any],
    data: Data = "digits",
    seed: Annotated[int, typer.Option(min=0, help="Decides split, noise, initial weights and order.")] = 0,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Processes on this node; torchrun sets it itself.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes; torchrun sets it itself.")] = 1,
    strategy: Annotated[str, typer.Option(help="ddp or fsdp, for several processes.")] = "ddp",
    precision: Precision = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; else one for an MLP.")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints; else an epoch.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/DATA-METHOD-sSEED")] = None,
    as_json: AsJSON = False,
) -> None:
    """Train one model with one method on one task; the same command continues it, also after kill -9.

    Examples:

        steppe run "SAM(rho=0.2)"

        steppe run "WSAM(rho=0.1, gamma=0.9)" --data cifar10 --data-dir ~/data --noise 0.4 --device cuda

        torchrun --nproc-per-node 8 --no-python steppe run "SAM(rho=0.05)" --data cifar10 --data-dir ~/data
    """
    import torch

    from steppe.lab import presets, single
    from steppe.lab.hardware import Hardware

    asked = presets.planned(data, given, [method], seeds=1, first=seed).runs()[0]
    hardware = Hardware(device, devices, nodes, strategy, precision)
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
        result = f"test error {100 * found.test_error:.2f} %, training loss {loss}, {found.seconds:.1f} s"
        line(console, f"{asked}: {result}{', collapsed' if found.collapsed else ''}; in {folder}")


def _watch(display: Display) -> "Callable[[Session, dict[str, Any]], None]":
    """Return what shows the metrics of a run on a display."""
    seen: dict[str, Any] = {}

    def watch(session: "Session", metrics: dict[str, Any]) -> None:
        seen.update(metrics)
        step, epochs = metrics["step"], session.run.epochs
        note = f"epoch {step * epochs // session.steps}/{epochs}"
        note += f", test error {100 * seen['test_error']:.1f} %" if "test_error" in seen else ""
        note += f", loss {seen['loss']:.3f}" if "loss" in seen else ""
        display.update(step, session.steps, note)
        if "test_error" in metrics:
            display.line(f"{note}, {metrics['seconds']:.1f} s", always=False)

    return watch


@_with_settings
def compare(
    given: dict[str, Any],
    data: Data = "digits",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method such as 'SAM(rho=0.2, m=16)' or 'SGD(epochs=2x)'; repeatable; without it, several."
        ),
    ] = None,
    baseline: Baseline = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds 0 to N-1 for each method.", show_default="the data's")
    ] = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
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
    from steppe.lab import presets
    from steppe.lab.hardware import Hardware

    hardware = Hardware(device=device, precision=precision)
    hardware.open()
    plan = presets.planned(data, given, method, baseline, seeds, quick)
    folder = out or Path("runs") / f"compare-{data}{'-quick' if quick else ''}"
    raise typer.Exit(compared(folder, plan, workers, Console(), hardware))


def report(folder: Folder, baseline: Baseline = None, as_json: AsJSON = False) -> None:
    """Rebuild a directory's report.html, summary.md and summary.csv from its records alone.

    Examples:

        steppe report runs/compare-digits

        steppe report runs/label_noise-laptop/noise-0.4 --baseline 'SAM(rho=0.5)' --json
    """
    from steppe.lab import report as page
    from steppe.lab import tables

    if as_json:
        typer.echo(json.dumps(tables.plain(page.write(folder, baseline)), indent=1))
    else:
        _publish(folder, baseline, Console())


def measure(folder: Folder) -> None:
    """Measure the minimum of every finished run: loss, top Hessian eigenvalue, trace, tr V, m-sharpness.

    The same command continues an interrupted measurement. The table goes into the directory's report.
    """
    raise typer.Exit(minima_measured(folder, Console()))


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


def compared(
    folder: Path, plan: "Plan", workers: int | None, console: Console, hardware: "Hardware | None" = None
) -> int:
    """Train the runs that a directory lacks, and report; return the exit code."""
    from steppe.lab.compare import compare
    from steppe.lab.hardware import CPU

    try:
        failures = compare(folder, plan, workers, hardware or CPU, console)
    except BrokenExecutor:
        line(console, "A worker process was lost, killed for memory perhaps; the same command continues.")
        return 1
    _publish(folder, None, console)
    for failure in failures:
        line(console, f"\n{failure.run} failed: {failure.reason}\n{failure.details}")
    return 1 if failures else 0


def _publish(folder: Path, baseline: str | None, console: Console) -> None:
    """Write the report of a directory; print its table, and that of the minima as far as there is room."""
    from steppe.lab import report as page
    from steppe.lab.report import curvature

    found = page.write(folder, baseline)
    show(found, console)
    if (measured := curvature.section(folder, found)) is not None:
        rows = [[name, *cells][:5] for name, _, cells in measured.rows]  # up to the trace: a terminal has 80 columns
        console.print(table(measured.headers[:5], rows, caption=measured.caption))
        for note in measured.notes:
            console.print(f"- {note}", markup=False, highlight=False)
    line(console, f"\nReport: {folder / 'report.html'}")


def minima_measured(folder: Path, console: Console) -> int:
    """Measure the minima that are missing, and report; return the exit code."""
    from steppe.lab import minima, runs
    from steppe.lab.errors import LabError

    records, problems = runs.finished(folder, runs.read_plan(folder))
    for problem in problems:
        line(console, problem)
    if not records:
        raise LabError(f"{folder} holds no finished run")
    left = sum(not runs.path_of(folder, run, "minima").exists() for run in records)
    line(console, f"{left} runs to measure, {len(records) - left} already measured")
    failures = []
    with Display(console, "minima", len(records)) as display:
        for i, (run, result) in enumerate(minima.measure_all(folder, records), 1):
            display.update(i, note=f"{i}/{len(records)}")
            if isinstance(result, Exception):
                failures.append(f"{run}: {result}")
            else:
                rough = "" if result.minimum.converged else ", not converged"
                display.line(f"{run}: loss {result.minimum.loss:.3f}, top eigenvalue {result.minimum.top:.2f}{rough}")
    _publish(folder, None, console)
    for failure in failures:
        line(console, failure)
    return 1 if failures else 0
