"""The missing runs of a plan, trained by one-thread processes that record each run they finish."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from rich.console import Console

from steppe.lab import files, single
from steppe.lab.errors import PausedError, reason
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.record import Record, told
from steppe.lab.runs import Plan, Run, finish, finished, open_for
from steppe.lab.terminal import Display, line
from steppe.lab.train import Session

_EVERY = 0.1  # seconds between two progress messages of a run
FOREVER = float("inf")


@dataclass(frozen=True)
class Failure:
    """A run that raised, with the traceback as text."""

    run: Run
    reason: str
    details: str


def compare(
    folder: Path,
    asked: Plan,
    workers: int | None = None,
    hardware: Hardware = CPU,
    console: Console | None = None,
    until: float = FOREVER,
) -> list[Failure]:
    """Train and record the runs of a plan that a directory lacks; return those that failed.

    Finished runs are kept whatever happens; the others have a checkpoint a minute. ``workers`` is one process for each
    core if ``None``; one worker is this process. ``until`` is a time of ``time.time()``.

    Raises:
        LabError: the directory holds something else, or another command works in it.
        BrokenExecutor: a process was lost.
        PausedError: it is later than ``until``.
    """
    console = console or Console()
    with files.hold(folder):
        known, _ = finished(folder, open_for(folder, asked))
        runs = [run for run in asked.runs() if run not in known]
        line(console, f"{len(runs)} runs to do, {len(asked.runs()) - len(runs)} already in {folder}")
        if not runs:
            return []
        work = Work(folder, hardware, until)
        with Display(console, "all runs", sum(run.epochs for run in runs)) as display:
            if (workers or os.cpu_count()) == 1:
                return _train_here(work, runs, display)
            return _train_all(work, runs, workers or os.cpu_count() or 1, display)


@dataclass(frozen=True)
class Work:
    """Where a run is recorded, on what it is trained, and until when."""

    folder: Path
    hardware: Hardware
    until: float


def _train_here(work: Work, runs: list[Run], display: Display) -> list[Failure]:
    """Train in this process, which needs no importable main module."""
    if work.hardware.device == "cpu":
        torch.set_num_threads(1)  # as in the processes; one thread adds in one order
    ended: list[Record | Failure] = []
    for run in runs:
        result = _execute(work, run, lambda: False, partial(_show, display, run))
        if result is None:
            raise PausedError
        ended.append(result)
        _tell(display, run, result, len(ended), len(runs))
    return [one for one in ended if isinstance(one, Failure)]


def _show(display: Display, run: Run, epochs: float) -> None:
    display.part(str(run), epochs, run.epochs, f"epoch {int(epochs)}/{run.epochs}")


def _tell(display: Display, run: Run, result: Record | Failure, ended: int, count: int) -> None:
    """Show how a run ended."""
    display.part(str(run), run.epochs, run.epochs)
    display.update(note=f"{ended}/{count}")
    if isinstance(result, Failure):
        display.line(f"{run} failed: {result.reason}")
    else:
        error = f"{told(result.metric, result.test_error)}, {result.seconds:.1f} s"
        display.line(f"{ended}/{count} {run}: {error}{', collapsed' if result.collapsed else ''}", always=False)


def _train_all(work: Work, runs: list[Run], workers: int, display: Display) -> list[Failure]:
    context = multiprocessing.get_context("spawn")
    messages: SimpleQueue[tuple[Run, float]] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(min(workers, len(runs)), context, _enter, (messages, stop)) as pool:
        # the processes that the first submit starts inherit that they ignore Ctrl-C
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            futures = {pool.submit(_execute_there, work, run): run for run in runs}
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            return _follow(futures, messages, display)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(
    futures: dict["Future[Record | Failure | None]", Run], messages: "SimpleQueue[tuple[Run, float]]", display: Display
) -> list[Failure]:
    pending, ended, failures, paused = set(futures), 0, [], False
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not messages.empty():
            run, epochs = messages.get()
            _show(display, run, epochs)
        for future in done:
            if (result := future.result()) is None:
                paused = True
                continue
            ended += 1
            failures += [result] if isinstance(result, Failure) else []
            _tell(display, futures[future], result, ended, len(futures))
    if paused:
        raise PausedError
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


def _execute_there(work: Work, run: Run) -> Record | Failure | None:
    messages, stop = _channel
    return _execute(work, run, stop.is_set, lambda epochs: messages.put((run, epochs)))


def _execute(work: Work, run: Run, stop: Callable[[], bool], show: Callable[[float], None]) -> Record | Failure | None:
    """Train and record a run; return ``None`` if it is paused."""
    told = time.monotonic()

    def tell(session: Session) -> None:
        nonlocal told
        if time.monotonic() - told > _EVERY:
            show(run.epochs * session.step / session.steps)
            told = time.monotonic()

    def over() -> bool:
        return stop() or time.time() > work.until

    try:
        if over():
            return None
        session = Session(run, work.hardware.open())
        single.carry_on(session, work.folder, over, tell)
        finish(work.folder, run, found := session.record(), session.model.state_dict())
        single.forget(work.folder, run)
        return found
    except PausedError:
        return None
    except Exception as error:  # returned as text: not every exception survives pickling
        return Failure(run, reason(error), traceback.format_exc())
