"""The command `steppe measure`."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from steppe.lab.console import told
from steppe.lab.settings import LabError

_SHOWN = 5  # columns that a terminal has room for: up to the trace; the report has all


def measure(
    folder: Annotated[Path, typer.Argument(help="A run directory of `steppe compare` or `steppe reproduce`.")],
) -> None:
    """Measure the minimum of every finished run: loss, top Hessian eigenvalue, trace, tr V, m-sharpness.

    The same command continues where it was interrupted. The table goes into the directory's report.
    """
    console = Console()
    with told(console):
        raise typer.Exit(measure_minima(folder, console))


def measure_minima(folder: Path, console: Console) -> int:
    """Measure what is missing and report; return the exit code."""
    from steppe.lab import directory, minima

    records, problems = directory.finished(folder, directory.read_plan(folder))
    for problem in problems:
        console.print(problem, style="red", markup=False)
    if not records:
        raise LabError(f"{folder} holds no finished run")
    left = sum(not minima.path(folder, run).exists() for run in records)
    console.print(f"{left} runs to measure, {len(records) - left} already measured", highlight=False)
    try:
        failures = _measure(folder, records, console)
    except KeyboardInterrupt:
        console.print("Stopped. What is measured is kept; the same command continues.", highlight=False)
        return 130
    _publish(folder, console)
    for run, error in failures:
        console.print(f"{run.method} seed {run.seed}: {error}", style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def _measure(folder: Path, records: dict, console: Console) -> list:  # type: ignore[type-arg]
    from steppe.lab import minima
    from steppe.lab.train import Run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("minima", total=len(records))

        def done(run: Run, result: minima.Measured | Exception) -> None:
            progress.advance(bar)
            if isinstance(result, minima.Measured):
                found = f"loss {result.minimum.loss:.3f}, top eigenvalue {result.minimum.top:.2f}"
                rough = "" if result.minimum.converged else ", not converged"
                console.print(f"{run.method} seed {run.seed}: {found}{rough}", markup=False, highlight=False)

        return minima.measure_all(folder, records, done)


def _publish(folder: Path, console: Console) -> None:
    from steppe.lab import report
    from steppe.lab.report import minima

    table = minima.section(folder, report.write(folder))
    if table is None:
        return
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=table.caption, caption_justify="left")
    for i, header in enumerate(table.headers[:_SHOWN]):
        shown.add_column(header, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for name, _, cells in table.rows:
        shown.add_row(*map(Text, [name, *cells][:_SHOWN]))
    console.print(shown)
    for note in table.notes:
        console.print(f"- {note}", markup=False, highlight=False)
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False, soft_wrap=True)
