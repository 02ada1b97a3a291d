"""``steppe report`` and ``measure``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from steppe.lab.commands.options import AsJSON, Baseline, DataDir, Folder
from steppe.lab.errors import LabError
from steppe.lab.terminal import SHORT, Display, bullets, line, show, table

if TYPE_CHECKING:
    from steppe.lab.report.fair import Outcomes


def report(folder: Folder, baseline: Baseline = None, as_json: AsJSON = False) -> None:
    """Rebuild a directory's report.html, summary.md and summary.csv.

    They are made from its records alone.

    Examples:

        steppe report runs/compare-digits
        steppe report runs/compare-digits --baseline 'SAM(m=16)' --json
    """
    if as_json:
        print_json(folder, baseline)
    else:
        publish(folder, baseline, Console())


def print_json(folder: Path, baseline: str | None) -> None:
    """Write the report of a directory, and print what its tables say."""
    from steppe.lab import report as page
    from steppe.lab import tables
    from steppe.lab.report import fair

    data = tables.plain(page.write(folder, baseline))
    fairly = fair.read(folder, baseline)
    data |= {} if fairly is None else {"comparison": fair.plain(fairly)}
    typer.echo(json.dumps(data, indent=1))


def measure(folder: Folder, data_dir: DataDir = None) -> None:
    """Measure the minimum of every finished run: loss, top Hessian eigenvalue, trace, tr V, m-sharpness.

    The same command continues an interrupted measurement. The table goes into the directory's report.
    """
    raise typer.Exit(minima_measured(folder, Console(), data_dir))


def publish(folder: Path, baseline: str | None, console: Console) -> None:
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
        rows = [cells[:5] for cells in measured.rows]  # up to the trace: a terminal has 80 columns
        table(console, measured.headers[:5], rows, caption=measured.caption)
        bullets(console, measured.notes)
    line(console, f"\nReport: {folder / 'report.html'}")


def _show_fair(found: "Outcomes", console: Console) -> None:
    """Print the tables of a fair comparison and its notes."""
    from steppe.lab import tables
    from steppe.lab.report import fair

    headers, rows = fair.table(found)
    table(console, [SHORT.get(header, header) for header in headers], rows, tables.title(found.found))
    headers, rows = fair.chosen(found)
    kept = [0, 2, 3, 6, 7, 8]
    table(console, [headers[i] for i in kept], [[row[i] for i in kept] for row in rows], "The searches")
    bullets(console, [*(f"{name}: {values}" for name, values, *_ in rows), *fair.notes(found)])


def minima_measured(folder: Path, console: Console, data_dir: Path | None = None) -> int:
    """Measure the minima that are missing, and report; return the exit code."""
    from steppe.lab import minima, runs

    records, problems = runs.finished(folder, runs.read_plan(folder))
    for problem in problems:
        line(console, problem)
    if not records:
        raise LabError(f"{folder} holds no finished run")
    left = sum(not runs.path_of(folder, run, "minima").exists() for run in records)
    line(console, f"{left} runs to measure, {len(records) - left} already measured")
    failures = []
    with Display(console, "minima", len(records)) as display:
        for i, (run, result) in enumerate(minima.measure_all(folder, records, data_dir), 1):
            display.update(i, note=f"{i}/{len(records)}")
            if isinstance(result, Exception):
                failures.append(f"{run}: {result}")
            else:
                rough = "" if result.minimum.converged else ", not converged"
                display.line(f"{run}: loss {result.minimum.loss:.3f}, top eigenvalue {result.minimum.top:.2f}{rough}")
    publish(folder, None, console)
    for failure in failures:
        line(console, failure)
    return 1 if failures else 0
