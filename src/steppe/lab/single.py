"""One run in its directory, with checkpoints: it can be stopped at any time and continued bit for bit."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from steppe.lab import checkpoint, files, metrics
from steppe.lab.errors import LabError, PausedError, one_line
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.record import Record
from steppe.lab.runs import Plan, Run, finish, finished, merged, open_for, path_of
from steppe.lab.train import Session

_LOG_EVERY = 20  # steps between two lines of metrics; reading a loss waits for the device
_MINUTE = 60.0  # between two checkpoints of the runs of a comparison
_LEAST = 100  # steps between two checkpoints of runs with short epochs

Watch = Callable[[Session, dict[str, Any]], None]


def run(
    asked: Run,
    folder: Path,
    hardware: Hardware = CPU,
    save_every: int | None = None,
    watch: Watch = lambda session, line: None,
) -> Record:
    """Train one run in ``folder``, or continue it from its last checkpoint; return its record.

    On the same machine and number of processes, a continued run ends with the same weights as an uninterrupted one,
    bit for bit, also after ``kill -9`` in the middle of writing.

    Args:
        save_every: steps between two checkpoints; ``None`` is an epoch, or 100 steps if an epoch is shorter.
        watch: called with the session and every line of metrics, in the first process.

    Raises:
        LabError: the folder holds something else, another command works in it, or data, model or hardware are missing.

    Example:
        >>> found = run(Run(spec.parse("SAM(rho=0.2)"), 0, Settings()), Path("runs/digits"))
    """
    process, plan = hardware.open(), Plan.alone(asked)
    with files.hold(folder) if process.first else nullcontext():
        known, _ = finished(folder, merged(folder, plan, single=True))
        if asked in known:
            return known[asked]
        session = Session(asked, process)
        process.on_first(lambda: open_for(folder, plan, single=True))
        _restore(session, folder)
        _fit(session, folder, save_every or max(asked.settings.steps_per_epoch, _LEAST), watch)
        found, weights = session.record(), checkpoint.whole(dict(session.model.state_dict()))
        process.on_first(lambda: finish(folder, asked, found, weights))
        process.on_first(lambda: forget(folder, asked))
    return found


def _fit(session: Session, folder: Path, every: int, watch: Watch) -> None:
    """Train to the end; write metrics, and a checkpoint after ``every`` steps."""
    run, process = session.run, session.process
    log = path_of(folder, run, "metrics")
    if process.first:
        metrics.keep(log, session.step)
    for evaluated in session.fit():
        if process.first:
            for line in _lines(session, evaluated):
                metrics.append(log, line)
                watch(session, line)
        if session.step % every == 0:
            state = session.state()
            process.on_first(partial(checkpoint.write, path_of(folder, run, "checkpoints"), state))


def carry_on(
    session: Session,
    folder: Path,
    pause: Callable[[], bool] = lambda: False,
    tell: Callable[[Session], None] = lambda session: None,
) -> None:
    """Train a session to its end, from its checkpoint in ``folder`` if there is one; write one every minute.

    ``tell`` is called after every step.

    Raises:
        PausedError: ``pause()`` was true; there is a checkpoint.
    """
    saved, written = path_of(folder, session.run, "checkpoints"), time.monotonic()
    _restore(session, folder)
    for _ in session.fit():
        tell(session)
        stop = pause() and session.step < session.steps
        if stop or time.monotonic() - written > _MINUTE:
            checkpoint.write(saved, session.state())
            written = time.monotonic()
        if stop:
            raise PausedError


def _restore(session: Session, folder: Path) -> None:
    """Continue from the checkpoint of a session's run, if there is one.

    Raises:
        LabError: it is damaged, or of another model or optimizer.
    """
    if (saved := path_of(folder, session.run, "checkpoints")).exists():
        state = checkpoint.read(saved)
        try:
            session.restore(state)
        except Exception as error:  # what load_state_dict raises depends on what does not fit
            reason = shorten(one_line(error), 200)
            raise LabError(f"{saved} does not fit this run ({reason}); delete it to start the run again") from error


def forget(folder: Path, run: Run) -> None:
    """Remove the checkpoint of a run whose result is recorded."""
    path_of(folder, run, "checkpoints").unlink(missing_ok=True)


def _lines(session: Session, evaluated: bool) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics after a step: loss and rates now and then, the curves' points after evaluations."""
    if session.step % _LOG_EVERY == 0 or session.step == session.steps:
        group = session.optimizer.param_groups[0]
        rates: dict[str, Any] = {name: float(group[name]) for name in ("lr", "rho") if name in group}
        yield {"step": session.step, "loss": session.last_loss(), **rates}
    if evaluated:
        yield {"step": session.step, **session.meter.latest(), "seconds": session.meter.seconds}


def folder_of(asked: Run) -> Path:
    """Return the directory of a run that names none."""
    return Path("runs") / f"{asked.settings.data.replace(':', '.')}-{asked.name}"
