"""Processes that are forked from a server which has imported torch; each `python` of its own would import it again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any


def processes() -> BaseContext:
    """Return the context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.models", "pytest", "steppe", "tests.lab.helpers", "steppe.lab.fair"])
    return context


class Forked:
    """``f(*args)`` in a process group of its own, its output in a file."""

    def __init__(self, f: Callable[..., object], *args: Any) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self.log = Path(name)
        self.process = processes().Process(target=_alone, args=(self.log, f, args))
        self.process.start()

    def interrupt(self) -> None:
        """Press a terminal's Ctrl-C, which reaches every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self.process.kill()

    def end(self, timeout: float = 60) -> tuple[str, int]:
        """Return output and exit code; the number of a signal is negative."""
        self.process.join(timeout)
        output, code = self.log.read_text(), self.process.exitcode
        if code is None:
            self.kill()
        self.log.unlink()
        assert code is not None, f"not in time: {output}"
        return output, code


def _alone(log: Path, f: Callable[..., object], args: tuple[Any, ...]) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    f(*args)
