"""Work through a search: claim a point, train its seeds, tell the value; wait while others have the last points."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from optuna.trial import Trial, TrialState

from steppe.lab import single
from steppe.lab.compare import FOREVER, leave_with_parent
from steppe.lab.errors import LabError, NotFiniteError, PausedError, reason
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.record import Record
from steppe.lab.runs import Run
from steppe.lab.sweep.space import Search, Stage, Value, applied, filled
from steppe.lab.sweep.study import HEARTBEAT, INTERRUPTED, POINT, Grid, open_storage
from steppe.lab.train import Session

_POLL = 0.5  # seconds between looks at points that other workers train
Tell = Callable[[str, int], None]  # a line, and how many points are done


@dataclass(frozen=True)
class Worksite:
    """Where a search is kept and trained: its storage, its name there, a folder of its own, hardware, an end."""

    url: str
    name: str
    folder: Path
    hardware: Hardware = CPU
    until: float = FOREVER
    heartbeat: int = HEARTBEAT

    def grid(self, asked: Search, stage: Stage, values: Mapping[str, Value]) -> Grid:
        """Create or join the study of a stage."""
        study = f"{self.name}/{stage.name}/{asked.digest(stage, values)}"
        return Grid.open(open_storage(self.url, self.heartbeat), study, stage, asked.limit)


def search(
    asked: Search, site: Worksite, workers: int = 1, tell: Tell = lambda line, done: None
) -> tuple[dict[str, Value], list[dict[str, Any]]]:
    """Run every stage with ``workers`` processes here, beside those of other machines.

    Any process may be killed: the others train its point again, and the same call continues an interrupted search.
    Return the values chosen, and every stage with its points as plain data.

    Raises:
        LabError: a point failed.
        PausedError: it is later than the site's ``until``.
    """
    values, stages = dict(asked.values), []
    groups = [[stage] for stage in asked.stages] if asked.chained else [list(asked.stages)]
    with ExitStack() as helpers:
        for group in groups:
            grids = [site.grid(asked, stage, values) for stage in group]
            if workers > 1 and sum(len(grid.trials(TrialState.WAITING)) for grid in grids) > 1:
                helpers.enter_context(_helpers(workers - 1, (asked, site)))
                workers = 1  # the helpers go through the remaining stages too
            _work(grids, asked, site, values, tell)
            for stage, grid in zip(group, grids, strict=True):
                chosen = grid.best()
                values |= chosen if asked.chained else {}
                tell(f"{stage.name}: " + ", ".join(f"{key} = {value}" for key, value in chosen.items()), -1)
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
    except PausedError:  # they look at the clock themselves
        raise
    except BaseException:
        for process in processes:
            os.kill(process.pid or 0, signal.SIGINT)  # they give their points back
        raise
    finally:
        for process in processes:
            process.join()


def _help(asked: Search, site: Worksite) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands down an ignored one
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with suppress(KeyboardInterrupt, LabError, PausedError):  # the parent reports mistakes
        search(asked, site)


def _work(grids: list[Grid], asked: Search, site: Worksite, values: Mapping[str, Value], tell: Tell) -> None:
    """Train points until all are done, here or elsewhere."""
    left = list(grids)
    while left:
        if time.time() > site.until:
            raise PausedError
        for grid in left:
            if trial := grid.claim():
                point = grid.stage.points()[trial.user_attrs[POINT]]
                with grid.beating(trial):
                    _train(grid, trial, asked, site, {**values, **point})
                done = sum(len(one.ended()) for one in grids)
                tell(f"{grid.stage.name}: {len(grid.ended())} of {len(grid.stage.points())} points", done)
                break
        else:
            left = [grid for grid in left if not grid.is_done()]
            time.sleep(_POLL if left else 0)


def _train(grid: Grid, trial: Trial, asked: Search, site: Worksite, values: Mapping[str, Value]) -> None:
    """Train a point seed by seed and tell its mean validation error, or that it gets no further seed."""
    method, settings = filled(grid.stage.method, values), applied(asked.settings, values)
    costs: list[float] = []
    errors: list[float] = []
    seconds = passes = 0.0
    try:
        for seed in range(asked.first, asked.first + asked.seeds):
            found = train(Run(method, seed, method.under(settings)), site)
            costs.append(math.inf if found is None else found.cost)
            if found is not None:
                errors.append(found.shown)
                seconds, passes = seconds + found.seconds, passes + found.passes
            worst = grid.note(trial, errors, fmean(costs), seed)
            if asked.chained and len(costs) < asked.seeds and worst:
                return grid.tell(trial, None, TrialState.PRUNED)
        grid.cost(trial, seconds, passes)
        grid.tell(trial, fmean(costs), TrialState.COMPLETE)
    except Exception as error:
        if isinstance(error, PausedError):
            grid.tell(trial, None, TrialState.FAIL, INTERRUPTED)
            raise
        grid.tell(trial, None, TrialState.FAIL, reason(error))
    except BaseException:  # interrupted: the point is queued again
        grid.tell(trial, None, TrialState.FAIL, INTERRUPTED)
        raise


def train(run: Run, site: Worksite) -> Record | None:
    """Train a run of the search; return ``None`` if its metric ends as no finite number."""
    session = Session(run, site.hardware.open())
    single.carry_on(session, site.folder, lambda: time.time() > site.until)
    single.forget(site.folder, run)
    with suppress(NotFiniteError):
        return session.record()
    return None
