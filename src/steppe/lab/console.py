"""What the commands share: running a plan with its display, showing the summary, telling mistakes in one line."""

from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steppe.lab.settings import LabError

if TYPE_CHECKING:
    from steppe.lab.directory import Plan
    from steppe.lab.place import Hardware
    from steppe.lab.summary import Summary

_SHORT = {"difference": "diff.", "seconds": "s"}  # headers that a terminal of 80 columns has no room for


def run(folder: Path, asked: "Plan", workers: int, console: Console, hardware: "Hardware | None" = None) -> int:
    """Run what is missing and report; return the exit code."""
    from steppe.lab import directory
    from steppe.lab.compare import compare
    from steppe.lab.place import CPU
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
                failures = compare(folder, runs, workers, display, hardware or CPU)
    except (KeyboardInterrupt, BrokenExecutor) as error:
        lost = isinstance(error, BrokenExecutor)
        kept = f"{len(directory.finished(folder, whole)[0])} of {len(whole.runs())} runs are kept in {folder}"
        why = "A worker process was lost, killed for memory perhaps" if lost else "Stopped"
        console.print(f"{why}. {kept}; the same command continues.", highlight=False, soft_wrap=True)
        return 1 if lost else 130
    publish(folder, None, console)
    for failure in failures:
        console.print(
            f"\n{failure.run.method} seed {failure.run.seed} failed: {failure.reason}", style="red", markup=False
        )
        console.print(failure.details, markup=False, highlight=False)
    return 1 if failures else 0


def publish(folder: Path, baseline: str | None, console: Console, quiet: bool = False) -> "Summary":
    """Write a directory's report; print its table unless `quiet`."""
    from steppe.lab import report as page

    if quiet:
        return page.write(folder, baseline)
    with console.status("writing the report"):
        found = page.write(folder, baseline)
    show(found, console)
    console.print(f"\nReport: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return found


def show(found: "Summary", console: Console) -> None:
    """Print the table and the notes."""
    from steppe.lab import summary

    headers, lines = summary.table(found)
    if all(row.paper is None for row in found.rows) and "paper %" in headers:  # a terminal has no room to say nothing
        at = headers.index("paper %")
        headers, lines = headers[:at] + headers[at + 1 :], [cells[:at] + cells[at + 1 :] for cells in lines]
    table = Table(title=summary.title(found), caption=summary.caption(found), caption_justify="left")
    table.box, table.padding, table.pad_edge = box.SIMPLE_HEAD, (0, 0), False
    for i, header in enumerate(headers):
        table.add_column(_SHORT.get(header, header), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for cells in lines:
        table.add_row(*map(Text, cells))
    console.print(table)
    for note in summary.notes(found):
        console.print(f"- {note}", markup=False, highlight=False)


@contextmanager
def told(console: Console) -> Iterator[None]:
    """Tell a mistake in what was asked for, or an interruption, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        line(console, "Stopped. What is finished is kept; the same command continues.")
        raise typer.Exit(130) from None
    except LabError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def line(console: Console, text: str) -> None:
    """Print one line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
