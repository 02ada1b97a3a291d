"""``steppe compare``, ``report`` and ``measure``."""

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steppe.lab.commands.options import (
    AsJSON,
    Baseline,
    Data,
    Device,
    Folder,
    Precision,
    Storage,
    Workers,
    with_settings,
)
from steppe.lab.errors import PausedError
from steppe.lab.terminal import SHORT, Display, line, show, table

if TYPE_CHECKING:
    from steppe.lab.compare import Failure
    from steppe.lab.fair import Asked
    from steppe.lab.hardware import Hardware
    from steppe.lab.report.fair import Outcomes
    from steppe.lab.runs import Plan

PAUSED = 75  # the exit code of a command whose --minutes are over; sysexits.h: try again later


Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="A method such as SAM, 'SAM(m=16)' or 'SAM(m={m})'; what it leaves open is searched; repeatable."
    ),
]
Trials = Annotated[int | None, typer.Option(min=1, help="Of each method's search.", show_default="the data's")]
SearchSeeds = Annotated[int | None, typer.Option(min=1, help="Seeds of each trial.", show_default="the data's")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Final seeds, 0 to N-1.", show_default="the data's")]
Equal = Annotated[str, typer.Option(help="What the longest runs cost alike: passes, seconds or epochs.")]
Spaces = Annotated[list[str] | None, typer.Option(help="Search rho=0.05,0.1,0.2 or rho=0.01..1; repeatable.")]
Held = Annotated[float, typer.Option(help="Share of the training examples that the searches hold out.")]
SearchMinutes = Annotated[
    float | None, typer.Option(help="Of training in each method's search; after them it begins no trial.")
]
Near = Annotated[int, typer.Option(min=0, help="How many of the trials are drawn near the best of the others.")]
SearchDraw = Annotated[int, typer.Option(min=0, help="Another number: other trials and other seeds of the searches.")]
Clean = Annotated[bool, typer.Option(help="Keep the held-out labels free of --noise.")]
IsFixed = Annotated[bool, typer.Option("--fixed", help="Compare at the given parameters, without a search.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long, keep everything, exit with 75.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/compare-DATA")]
Quick = Annotated[bool, typer.Option("--quick", help="A tiny version, less than a minute.")]
OwnTask = Annotated[str | None, typer.Option(help="Your task, module:function; the same as --data.")]


@with_settings
def compare(
    given: dict[str, Any],
    data: Data = "digits",
    task: OwnTask = None,
    method: Methods = None,
    trials: Trials = None,
    search_seeds: SearchSeeds = None,
    search_minutes: SearchMinutes = None,
    near: Near = 0,
    search_draw: SearchDraw = 0,
    seeds: Seeds = None,
    equal: Equal = "passes",
    space: Spaces = None,
    validation: Held = 0.25,
    clean_validation: Clean = False,
    fixed: IsFixed = False,
    baseline: Baseline = None,
    storage: Storage = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    workers: Workers = None,
    minutes: Minutes = None,
    out: Out = None,
    quick: Quick = False,
) -> None:
    """Compare methods with an equal search for each, then final seeds, on one task; write a report.

    The base optimizer is always there: tuned, for as many passes (or seconds), and at a quarter of the batch size. The
    same command continues a directory; with --fixed, methods and seeds may be added to it.

    Examples:

        steppe compare --quick

        steppe compare --task mytask:cars --method SAM --method 'SAM(m={m}, sampled=1)'

        steppe compare --noise 0 --method WSAM --trials 30 --space rho=0.02..2

        steppe compare --fixed --method SGD --method 'SAM(rho=0.5)' --method 'WSAM(rho=0.5, gamma=0.9)' --seeds 10

        until steppe compare --data cifar10 --model wrn28-10 --device cuda --minutes 9; do test $? = 75 || break; done
    """
    from steppe.lab import presets
    from steppe.lab.hardware import Hardware
    from steppe.lab.sweep.space import parse

    source, until = task or data, time.time() + 60 * minutes if minutes else float("inf")
    (hardware := Hardware(device=device, precision=precision)).open()
    folder = out or _folder(source, fixed, quick)
    if fixed:
        plan = presets.planned(source, given, method, baseline, seeds, quick)
        raise typer.Exit(compared(folder, plan, workers, Console(), hardware, until))
    choices: dict[str, Any] = {"trials": trials, "search_seeds": search_seeds, "search_minutes": search_minutes}
    choices |= {"near": near, "draw": search_draw, "equal": equal, "validation": validation, "clean": clean_validation}
    asked = presets.asked(source, given, method, seeds, quick, spaces=dict(map(parse, space or [])), **choices)
    raise typer.Exit(searched(folder, asked, workers, Console(), hardware, until, storage, baseline))


def _folder(source: str, fixed: bool, quick: bool) -> Path:
    """Return the run directory of a comparison that names none."""
    kind = f"{'-fixed' if fixed else ''}{'-quick' if quick else ''}"
    return Path("runs") / f"compare-{source.replace(':', '.')}{kind}"


def report(folder: Folder, baseline: Baseline = None, as_json: AsJSON = False) -> None:
    """Rebuild a directory's report.html, summary.md and summary.csv from its records alone.

    Examples:

        steppe report runs/compare-digits

        steppe report runs/label_noise-laptop/noise-0.4 --baseline 'SAM(rho=0.5)' --json
    """
    from steppe.lab import report as page
    from steppe.lab import tables
    from steppe.lab.report import fair

    if as_json:
        data = tables.plain(page.write(folder, baseline))
        fairly = fair.read(folder, baseline)
        data |= {} if fairly is None else {"comparison": fair.plain(fairly)}
        typer.echo(json.dumps(data, indent=1))
    else:
        _publish(folder, baseline, Console())


def measure(folder: Folder) -> None:
    """Measure the minimum of every finished run: loss, top Hessian eigenvalue, trace, tr V, m-sharpness.

    The same command continues an interrupted measurement. The table goes into the directory's report.
    """
    raise typer.Exit(minima_measured(folder, Console()))


def compared(
    folder: Path,
    plan: "Plan",
    workers: int | None,
    console: Console,
    hardware: "Hardware | None" = None,
    until: float = float("inf"),
) -> int:
    """Train the runs that a directory lacks, and report; return the exit code."""
    from steppe.lab.compare import compare
    from steppe.lab.hardware import CPU

    return _reported(folder, console, None, lambda: compare(folder, plan, workers, hardware or CPU, console, until))


def searched(
    folder: Path,
    asked: "Asked",
    workers: int | None,
    console: Console,
    hardware: "Hardware",
    until: float,
    storage: str | None,
    baseline: str | None,
) -> int:
    """Run a fair comparison, and report; return the exit code."""
    from steppe.lab import fair

    processes = workers or (os.cpu_count() or 1 if hardware.device == "cpu" else 1)
    work = partial(fair.run, folder, asked, processes, hardware, console, until, storage)
    return _reported(folder, console, baseline, work)


def _reported(folder: Path, console: Console, baseline: str | None, work: "Callable[[], list[Failure]]") -> int:
    """Do the work, and report; return the exit code."""
    try:
        failures = work()
    except BrokenExecutor:
        line(console, "A worker process was lost, killed for memory perhaps; the same command continues.")
        return 1
    except PausedError:
        line(console, "The time is over; everything is kept, and the same command continues.")
        return PAUSED
    _publish(folder, baseline, console)
    for failure in failures:
        line(console, f"\n{failure.run} failed: {failure.reason}\n{failure.details}")
    return 1 if failures else 0


def _publish(folder: Path, baseline: str | None, console: Console) -> None:
    """Write the report of a directory; print its table, and that of the minima as far as there is room."""
    from steppe.lab import report as page
    from steppe.lab.report import curvature, fair

    found = page.write(folder, baseline)
    fairly = fair.read(folder, baseline)
    if fairly is None:
        show(found, console)
    else:
        _show_fair(fairly, console)
    if (measured := curvature.section(folder, found)) is not None:
        rows = [[name, *cells][:5] for name, _, cells in measured.rows]  # up to the trace: a terminal has 80 columns
        console.print(table(measured.headers[:5], rows, caption=measured.caption))
        for note in measured.notes:
            console.print(f"- {note}", markup=False, highlight=False)
    line(console, f"\nReport: {folder / 'report.html'}")


def _show_fair(found: "Outcomes", console: Console) -> None:
    """Print the tables of a fair comparison and its notes."""
    from steppe.lab import tables
    from steppe.lab.report import fair

    headers, rows = fair.table(found)
    console.print(table([SHORT.get(header, header) for header in headers], rows, tables.title(found.found)))
    headers, rows = fair.chosen(found)
    kept = [0, 2, 3, 6, 7, 8]
    console.print(table([headers[i] for i in kept], [[row[i] for i in kept] for row in rows], "The searches"))
    for name, values, *_ in rows:
        console.print(f"- {name}: {values}", markup=False, highlight=False)
    for note in fair.notes(found):
        console.print(f"- {note}", markup=False, highlight=False)


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
