"""A comparison: the missing runs of a plan, trained by one-thread processes that record each run they finish."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from rich.console import Console

from steppe.lab import files
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.record import Record
from steppe.lab.runs import Plan, Run, finish, finished, open_for
from steppe.lab.terminal import Display, line
from steppe.lab.train import Session

_EVERY = 0.1  # seconds between two progress messages of a run


@dataclass(frozen=True)
class Failure:
    """A run that raised, with the traceback as text."""

    run: Run
    reason: str
    details: str


def compare(
    folder: Path, asked: Plan, workers: int | None = None, hardware: Hardware = CPU, console: Console | None = None
) -> list[Failure]:
    """Train and record the runs of a plan that a directory lacks; return those that failed.

    Finished runs are kept whatever happens. ``workers`` is one process for each core if ``None``.

    Raises:
        LabError: the directory holds something else, or another command works in it.
        BrokenExecutor: a process was lost.
    """
    console = console or Console()
    with files.hold(folder):
        known, _ = finished(folder, open_for(folder, asked))
        runs = [run for run in asked.runs() if run not in known]
        line(console, f"{len(runs)} runs to do, {len(asked.runs()) - len(runs)} already in {folder}")
        if not runs:
            return []
        with Display(console, "all runs", sum(run.epochs for run in runs)) as display:
            return _train_all(folder, runs, workers or os.cpu_count() or 1, hardware, display)


def _train_all(folder: Path, runs: list[Run], workers: int, hardware: Hardware, display: Display) -> list[Failure]:
    context = multiprocessing.get_context("spawn")
    messages: SimpleQueue[tuple[Run, float]] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(min(workers, len(runs)), context, _enter, (messages, stop)) as pool:
        # the processes that the first submit starts inherit that they ignore Ctrl-C
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = {pool.submit(_execute, folder, run, hardware): run for run in runs}
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            return _follow(futures, messages, display)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(
    futures: dict["Future[Record | Failure]", Run], messages: "SimpleQueue[tuple[Run, float]]", display: Display
) -> list[Failure]:
    pending, ended, failures = set(futures), 0, []
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not messages.empty():
            run, epochs = messages.get()
            display.part(str(run), epochs, run.epochs, f"epoch {int(epochs)}/{run.epochs}")
        for future in done:
            run, result, ended = futures[future], future.result(), ended + 1
            display.part(str(run), run.epochs, run.epochs)
            display.update(note=f"{ended}/{len(futures)}")
            if isinstance(result, Failure):
                failures.append(result)
                display.line(f"{run} failed: {result.reason}")
            else:
                error = f"error {100 * result.test_error:.1f} %, {result.seconds:.1f} s"
                collapsed = ", collapsed" if result.collapsed else ""
                display.line(f"{ended}/{len(futures)} {run}: {error}{collapsed}", always=False)
    return failures


# --- in the worker process


_channel: "tuple[SimpleQueue[tuple[Run, float]], Event]"


def _enter(messages: "SimpleQueue[tuple[Run, float]]", stop: Event) -> None:
    global _channel
    _channel = (messages, stop)
    torch.set_num_threads(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """End this process when its parent ends, also by ``kill -9``."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _execute(folder: Path, run: Run, hardware: Hardware) -> Record | Failure:
    messages, stop = _channel
    told = time.monotonic()
    try:
        session = Session(run, hardware.open())
        for _ in session.fit():
            if stop.is_set():
                raise KeyboardInterrupt  # as in the parent
            if time.monotonic() - told > _EVERY:
                messages.put((run, run.epochs * session.step / session.steps))
                told = time.monotonic()
        finish(folder, run, found := session.record(), session.model.state_dict())
        return found
    except Exception as error:  # returned as text: not every exception survives pickling
        return Failure(run, f"{type(error).__name__}: {error}", traceback.format_exc())
