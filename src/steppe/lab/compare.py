"""Run what a comparison still lacks: one-thread processes side by side, each recording the runs it finishes."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Protocol

import torch

from steppe.lab import record, weights
from steppe.lab.directory import path_of
from steppe.lab.place import CPU, Hardware
from steppe.lab.record import Record
from steppe.lab.train import Run, train

_EVERY = 0.1  # seconds between two progress messages of a run


@dataclass(frozen=True)
class Failure:
    """A run that raised, with the traceback as text."""

    run: Run
    reason: str
    details: str


class View(Protocol):
    """What wants to know how the comparison goes."""

    def step(self, run: Run, step: int, steps: int) -> None:
        """Take note that a run has come this far."""

    def done(self, run: Run, result: Record | Failure) -> None:
        """Take note that a run has ended."""


def compare(folder: Path, runs: list[Run], workers: int, view: View, hardware: Hardware = CPU) -> list[Failure]:
    """Train and record `runs`, `workers` at a time; return those that failed.

    Finished runs are kept whatever happens, also where this raises: `KeyboardInterrupt` on Ctrl-C, `BrokenExecutor`
    where a process was lost.
    """
    context = multiprocessing.get_context("spawn")
    messages: SimpleQueue[tuple[Run, int, int]] = context.SimpleQueue()
    stop = context.Event()
    with ProcessPoolExecutor(min(workers, len(runs)), context, _enter, (messages, stop)) as pool:
        with _interrupts_ignored():  # inherited by the processes that the first submit starts
            futures = {pool.submit(_execute, folder, run, hardware): run for run in runs}
        try:
            return _follow(futures, messages, view)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(
    futures: dict["Future[Record | Failure]", Run], messages: "SimpleQueue[tuple[Run, int, int]]", view: View
) -> list[Failure]:
    pending, failures = set(futures), []
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not messages.empty():
            view.step(*messages.get())
        for future in done:
            result = future.result()
            view.done(futures[future], result)
            failures += [result] if isinstance(result, Failure) else []
    return failures


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the worker process


class _Interrupted(Exception):  # noqa: N818 - it is no error
    """The comparison is being interrupted."""


class _Reporter:
    """Sends a run's progress now and then, and stops it when the comparison stops."""

    def __init__(self, messages: "SimpleQueue[tuple[Run, int, int]]", stop: Event, run: Run) -> None:
        self.messages, self.stop, self.run, self.last = messages, stop, run, 0.0

    def __call__(self, step: int, steps: int) -> None:
        if self.stop.is_set():
            raise _Interrupted
        if time.monotonic() - self.last > _EVERY or step == steps:
            self.messages.put((self.run, step, steps))
            self.last = time.monotonic()


_channel: "tuple[SimpleQueue[tuple[Run, int, int]], Event]"


def _enter(messages: "SimpleQueue[tuple[Run, int, int]]", stop: Event) -> None:
    global _channel
    _channel = (messages, stop)
    torch.set_num_threads(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, even by `kill -9`."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _execute(folder: Path, run: Run, hardware: Hardware) -> Record | Failure:
    reporter = _Reporter(*_channel, run)
    try:
        reporter(0, 1)
        result = train(run, reporter, keep=partial(weights.keep, folder, run), hardware=hardware)
        record.save(path_of(folder, run), result)
        return result
    except Exception as error:  # returned as text: not every exception survives pickling
        return Failure(run, f"{type(error).__name__}: {error}", traceback.format_exc())
