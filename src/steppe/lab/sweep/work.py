"""Work through a search: claim a point, train its seeds, tell the value; wait while others have the last points."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from statistics import fmean
from typing import Any

import torch
from optuna.trial import Trial, TrialState

from steppe.lab.compare import leave_with_parent
from steppe.lab.errors import LabError
from steppe.lab.runs import Run
from steppe.lab.sweep.space import Search, Value, applied, filled
from steppe.lab.sweep.study import ERRORS, HEARTBEAT, POINT, Grid, open_storage
from steppe.lab.train import train

_POLL = 0.5  # seconds between looks at points that other workers train


def search(
    asked: Search,
    url: str,
    name: str,
    workers: int = 1,
    heartbeat: int = HEARTBEAT,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Value], list[dict[str, Any]]]:
    """Run every stage with ``workers`` processes here, beside those of other machines.

    ``name`` distinguishes searches in one storage. Any process may be killed: the others train its point again, and the
    same call continues an interrupted search. Return the values chosen, and every stage with its points as plain data.
    """
    values, stages = dict(asked.values), []
    with ExitStack() as helpers:
        for stage in asked.stages:
            study = f"{name}/{stage.name}/{asked.digest(stage, values)}"
            grid = Grid.open(open_storage(url, heartbeat), study, stage)
            if workers > 1 and len(grid.trials(TrialState.WAITING)) > 1:
                helpers.enter_context(_helpers(workers - 1, (asked, url, name, heartbeat)))
                workers = 1  # the helpers go through the remaining stages too
            _work(grid, asked, values, tell)
            chosen = grid.best()
            values |= chosen
            tell(f"{stage.name}: " + ", ".join(f"{key} = {value}" for key, value in chosen.items()))
            stages.append({"name": stage.name, "method": stage.method, "chosen": chosen, "points": grid.points()})
    return values, stages


@contextmanager
def _helpers(count: int, arguments: tuple[Any, ...]) -> Iterator[None]:
    """Run ``count`` further processes that make the same search; they end when it is done, or with this process."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_help, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    except BaseException:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGINT)  # they give their points back
        raise
    finally:
        for process in processes:
            process.join()


def _help(asked: Search, url: str, name: str, heartbeat: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands down an ignored one
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt, LabError):  # the parent reports mistakes
        search(asked, url, name, workers=1, heartbeat=heartbeat)


def _work(grid: Grid, asked: Search, values: Mapping[str, Value], tell: Callable[[str], None]) -> None:
    """Train points until all are done, here or elsewhere."""
    stage, points = grid.stage, grid.stage.points()
    while True:
        if trial := grid.claim():
            with grid.beating(trial):
                _train(grid, trial, asked, {**values, **points[trial.user_attrs[POINT]]})
            tell(f"{stage.name}: {len(grid.ended())} of {len(points)} points")
        elif grid.trials(TrialState.WAITING, TrialState.RUNNING):
            time.sleep(_POLL)
        else:
            return


def _train(grid: Grid, trial: Trial, asked: Search, values: Mapping[str, Value]) -> None:
    """Train a point seed by seed and tell its mean validation error in per cent, or that it gets no further seed."""
    method, settings = filled(grid.stage.method, values), applied(asked.settings, values)
    errors: list[float] = []
    try:
        for seed in range(asked.seeds):
            errors.append(100 * train(Run(method, seed, settings)).test_error)
            trial.set_user_attr(ERRORS, errors)
            trial.report(fmean(errors), step=seed)
            if len(errors) < asked.seeds and trial.should_prune():
                return grid.tell(trial, None, TrialState.PRUNED)
        grid.tell(trial, fmean(errors), TrialState.COMPLETE)
    except Exception as error:
        grid.tell(trial, None, TrialState.FAIL, f"{type(error).__name__}: {error}")
    except BaseException:  # interrupted: the point is queued again
        grid.tell(trial, None, TrialState.FAIL)
        raise
