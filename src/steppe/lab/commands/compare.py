"""``steppe compare``."""

import os
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steppe.lab.commands import names
from steppe.lab.commands.names import completed
from steppe.lab.commands.options import (
    AsJSON,
    Baseline,
    Data,
    Device,
    OwnTask,
    Precision,
    Storage,
    Workers,
    source_of,
    with_settings,
)
from steppe.lab.commands.report import print_json, publish
from steppe.lab.errors import DEBUG, LabError, PausedError, unknown
from steppe.lab.terminal import line

if TYPE_CHECKING:
    from steppe.lab.compare import Failure
    from steppe.lab.fair import Asked
    from steppe.lab.hardware import Hardware
    from steppe.lab.runs import Plan

PAUSED = 75  # the exit code of a command whose --minutes are over; sysexits.h: try again later


Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="A method such as SAM, 'SAM(m=16)' or 'SAM(m={m})'; what it leaves open is searched; repeatable.",
        autocompletion=completed(names.METHODS),
    ),
]
Trials = Annotated[int | None, typer.Option(min=1, help="Of each method's search.", show_default="the data's")]
SearchSeeds = Annotated[int | None, typer.Option(min=1, help="Seeds of each trial.", show_default="the data's")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Final seeds, 0 to N-1.", show_default="the data's")]
Equal = Annotated[
    str | None,
    typer.Option(
        help="What the longest runs cost alike: passes, seconds or epochs.",
        show_default="passes",
        autocompletion=completed(names.EQUAL),
    ),
]
Spaces = Annotated[list[str] | None, typer.Option(help="Search rho=0.05,0.1,0.2 or rho=0.01..1; repeatable.")]
Held = Annotated[
    float | None,
    typer.Option(help="Share of the training examples that the searches hold out.", show_default="0.25"),
]
SearchMinutes = Annotated[
    float | None, typer.Option(min=0, help="Of training in each method's search; after them it begins no trial.")
]
Near = Annotated[int, typer.Option(min=0, help="How many of the trials are drawn near the best of the others.")]
SearchDraw = Annotated[int, typer.Option(min=0, help="Another number: other trials and other seeds of the searches.")]
Clean = Annotated[bool, typer.Option("--clean-validation", help="Keep the held-out labels free of --noise.")]
IsFixed = Annotated[bool, typer.Option("--fixed", help="Compare at the given parameters, without a search.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Stop after so long, keep everything, exit with 75.")]
Out = Annotated[Path | None, typer.Option(help="Run directory.", show_default="runs/compare-DATA")]
Quick = Annotated[bool, typer.Option("--quick", help="A tiny version, less than a minute.")]


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
    equal: Equal = None,
    space: Spaces = None,
    validation: Held = None,
    clean_validation: Clean = False,
    fixed: IsFixed = False,
    baseline: Baseline = None,
    storage: Storage = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    workers: Workers = None,
    minutes: Minutes = None,
    out: Out = None,
    quick: Quick = False,
    as_json: AsJSON = False,
) -> None:
    r"""Compare methods with an equal search for each, then final seeds, on one task; write a report.

    The base optimizer is always there: tuned, for as many passes (or seconds), and at a quarter of the batch size. The
    same command continues a directory; with --fixed, methods and seeds may be added to it.

    Examples:

        steppe compare --quick
        steppe compare --task mytask:cars --method 'SAM(m={m}, sampled=1)'
        steppe compare --noise 0 --method WSAM --trials 30 --space rho=0.02..2
        steppe compare --fixed --seeds 10 --method SGD \
            --method 'SAM(rho=0.5)' --method 'WSAM(rho=0.5, gamma=0.9)'
        until steppe compare --data cifar10 --minutes 9
            do test $? = 75 || break; done
    """
    from steppe.lab import presets

    source = source_of(data, task)
    folder = out or Path("runs") / f"compare-{source.replace(':', '.')}{'-fixed' * fixed}{'-quick' * quick}"
    common = (folder, workers, Console(stderr=as_json), _until(minutes), device, precision)
    searching: dict[str, Any] = {"trials": trials, "search_seeds": search_seeds, "search_minutes": search_minutes}
    searching |= {"near": near or None, "draw": search_draw or None, "equal": equal, "spaces": _spaces(space)}
    searching |= {"validation": validation, "clean": clean_validation or None}
    if fixed:
        _refuse(searching)
        code = compared(presets.planned(source, given, method, baseline, seeds, quick), *common)
    else:
        code = searched(presets.asked(source, given, method, seeds, quick, **searching), *common, storage, baseline)
    raise typer.Exit(_printed(code, folder, baseline) if as_json else code)


def _printed(code: int, folder: Path, baseline: str | None) -> int:
    """Print the results of a comparison that has ended as JSON; return its exit code."""
    if not code:
        print_json(folder, baseline)
    return code


def _until(minutes: float | None) -> float:
    return float("inf") if minutes is None else time.time() + 60 * minutes


def _spaces(texts: list[str] | None) -> dict[str, Any] | None:
    from steppe.lab.sweep.space import parse

    return dict(map(parse, texts)) if texts else None


def _hardware(device: str, precision: str, model: str) -> "Hardware":
    """Return the hardware after a look whether it is there."""
    from steppe.lab.hardware import Hardware

    asked = Hardware(device=device, precision=precision).chosen(model)
    asked.open()
    return asked


def _refuse(searching: dict[str, Any]) -> None:
    """Raise a ``LabError`` for options that a comparison without a search would ignore."""
    options = {"spaces": "space", "clean": "clean-validation", "draw": "search-draw"}
    if given := [name for name, value in searching.items() if value is not None]:
        option = options.get(given[0], given[0].replace("_", "-"))
        raise LabError(f"--fixed makes no search; leave --{option} out")


def compared(
    plan: "Plan",
    folder: Path,
    workers: int | None,
    console: Console,
    until: float = float("inf"),
    device: str = "cpu",
    precision: str = "fp32",
) -> int:
    """Train the runs that a directory lacks, and report; return the exit code."""
    from steppe.lab.compare import compare

    hardware = _hardware(device, precision, plan.settings.model)
    return _reported(folder, console, None, lambda: compare(folder, plan, workers, hardware, console, until))


def searched(
    asked: "Asked",
    folder: Path,
    workers: int | None,
    console: Console,
    until: float,
    device: str,
    precision: str,
    storage: str | None,
    baseline: str | None,
) -> int:
    """Run a fair comparison, and report; return the exit code."""
    from steppe.lab import fair
    from steppe.lab.sweep.study import open_storage

    hardware, known = _hardware(device, precision, asked.settings.model), fair.everyone(asked)
    if baseline is not None and baseline not in known:
        raise unknown(f"baseline {baseline!r} is none of the methods", baseline, known)
    if storage is not None:
        open_storage(storage)
    processes = workers or (os.cpu_count() or 1 if hardware.device == "cpu" else 1)
    work = partial(fair.run, folder, asked, processes, hardware, console, until, storage)
    return _reported(folder, console, baseline, work)


def _reported(folder: Path, console: Console, baseline: str | None, work: "Callable[[], list[Failure]]") -> int:
    """Do the work, and report; return the exit code."""
    try:
        failures = work()
    except BrokenExecutor:
        line(Console(stderr=True), "A worker process was lost, killed for memory perhaps; the same command continues.")
        return 1
    except PausedError:
        line(console, "The time is over; everything is kept, and the same command continues.")
        return PAUSED
    if failures:
        details = f"\n{failures[0].details}" if os.environ.get(DEBUG) else ""
        more = f" (and {len(failures) - 1} more failed)" if failures[1:] else ""
        line(Console(stderr=True), f"{failures[0].run} failed: {failures[0].reason}{more}{details}")
    publish(folder, baseline, console)
    return 1 if failures else 0
