"""One stage in an Optuna storage: each point is claimed by one worker, and a dead worker's point is claimed again.

Every point of the grid is a waiting trial from the start, so a claim is one change of state in one transaction. A
worker sends heartbeats while it trains a point. If they stop, for a killed process or a lost machine, any other worker
declares the trial failed and queues its point again. ``Study.optimize`` and Optuna's retry callback do not serve here:
a trial is claimed before its first heartbeat, so a worker killed between the two would hold its point forever.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any, ParamSpec, TypeVar
from warnings import catch_warnings

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import PercentilePruner
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from steppe.lab.errors import LabError
from steppe.lab.files import finite
from steppe.lab.sweep.space import Stage, Value

HEARTBEAT = 10  # seconds; three missed ones mean that the worker is dead
RETRIES = 3  # of a point whose worker died; a point that kills its workers is given up
WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0)  # seconds between tries to reach a database server
DROP = PercentilePruner(percentile=75.0, n_startup_trials=4)
POINT, ERRORS, REASON = "point", "errors", "reason"
TWIN, INTERRUPTED = "queued twice", "interrupted"  # reasons that are nobody's fault
SECONDS, PASSES = "seconds", "passes"

P = ParamSpec("P")
T = TypeVar("T")

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def patiently(call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that is tried again while its database is away, as when a server restarts.

    A call whose answer was lost is made twice; a :class:`Grid` bears that: a second trial of a point is dropped, and a
    claim that nobody works on has no heartbeats.

    Raises:
        LabError: the database did not come back, or refuses for another reason.
    """

    @wraps(call)
    def tried(*arguments: P.args, **options: P.kwargs) -> T:
        for wait in (*WAITS, None):
            try:
                return call(*arguments, **options)
            except (SQLAlchemyError, StorageInternalError) as error:
                if wait is None or not _away(error):
                    raise LabError(f"the storage of the search failed: {str(_cause(error)).splitlines()[0]}") from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    return tried


def _cause(error: Exception) -> Any:
    return error.__cause__ if isinstance(error, StorageInternalError) else error


def _away(error: Exception) -> bool:
    """Return whether a database server cannot be reached; SQLite is a file, and waits for its lock by itself."""
    cause = _cause(error)
    at_server = not type(getattr(cause, "orig", None)).__module__.startswith("sqlite3")
    return isinstance(cause, OperationalError | InterfaceError) and at_server


@dataclass(frozen=True)
class Grid:
    """A stage's points in a storage; none is begun once those that ended took ``limit`` seconds of training."""

    study: optuna.Study
    storage: RDBStorage
    stage: Stage
    limit: float = math.inf

    @classmethod
    @patiently
    def open(cls, storage: RDBStorage, name: str, stage: Stage, limit: float = math.inf) -> "Grid":
        """Create or join the study called ``name``, and queue the points that it lacks or that failed.

        A point gets no further seed when its mean is in the worst quarter of what finished points had after as many.
        A run is never stopped early: a large radius or learning rate looks bad half-way and ends well.
        """
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=DROP)
        grid = cls(study, storage, stage, limit)
        grid.queue(again=True)
        return grid

    @patiently
    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in some states, or all of them."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    @patiently
    def queue(self, again: bool = False) -> None:
        """Queue every point that has no trial; with ``again`` also those that raised or killed too many workers.

        Two workers may queue the same point at the same moment; :meth:`claim` drops the second trial.
        """
        trials = self.trials()
        points = self.stage.points()
        kinds: Any = {
            key: CategoricalDistribution(tuple(dict.fromkeys(point[key] for point in points))) for key in points[0]
        }
        for index, point in enumerate(points):
            mine = [trial for trial in trials if trial.user_attrs[POINT] == index]
            reasons = [trial.user_attrs.get(REASON) for trial in mine if trial.state is TrialState.FAIL]
            gone = reasons.count(None) > RETRIES or any(reason not in (None, TWIN, INTERRUPTED) for reason in reasons)
            if len(mine) == len(reasons) and (again or not gone):
                facts: Any = {"params": point, "distributions": kinds, "user_attrs": {POINT: index}}
                self.study.add_trial(create_trial(state=TrialState.WAITING, **facts))

    @patiently
    def claim(self) -> Trial | None:
        """Return a waiting trial that is now this worker's alone, ``None`` if none is waiting or the time is over."""
        if self.is_over():
            return None
        with catch_warnings(action="ignore", category=ExperimentalWarning):
            fail_stale_trials(self.study)
        self.queue()
        for found in self.trials(TrialState.WAITING):
            trial = Trial(self.study, found._trial_id)
            self.storage.record_heartbeat(found._trial_id)  # first, so that no claimed trial is without one
            with suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(found._trial_id, TrialState.RUNNING):
                    if not self._twin(found):
                        return trial
                    self.tell(trial, None, TrialState.FAIL, TWIN)
        return None

    def is_over(self) -> bool:
        """Return whether the points that ended took the time that the stage may take."""
        taken = (float(trial.user_attrs.get(SECONDS, 0.0)) for trial in self.ended().values())
        return self.limit < math.inf and sum(taken) >= self.limit

    def is_done(self) -> bool:
        """Return whether nothing is in work and nothing will be begun."""
        return not self.trials(TrialState.RUNNING) and (self.is_over() or not self.trials(TrialState.WAITING))

    def _twin(self, found: FrozenTrial) -> bool:
        """Return whether an earlier trial stands for the same point."""
        same = [one for one in self.trials()[: found.number] if one.user_attrs[POINT] == found.user_attrs[POINT]]
        return any(trial.state is not TrialState.FAIL for trial in same)

    @contextmanager
    def beating(self, trial: Trial) -> Iterator[None]:
        """Send heartbeats while the body runs."""
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(self.storage.get_heartbeat_interval() or HEARTBEAT):
                with suppress(SQLAlchemyError, StorageInternalError):  # away for a while: the next one may reach it
                    self.storage.record_heartbeat(trial._trial_id)

        pulse = threading.Thread(target=beat, daemon=True)
        pulse.start()
        try:
            yield
        finally:
            stop.set()
            pulse.join()

    @patiently
    def tell(self, trial: Trial, value: float | None, state: TrialState, reason: str = "") -> None:
        """End a trial; do nothing if it was declared dead meanwhile, because another worker has its point."""
        with suppress(UpdateFinishedTrialError):
            if reason:
                trial.set_user_attr(REASON, reason)
            self.study.tell(trial, value, state, skip_if_finished=True)

    @patiently
    def note(self, trial: Trial, errors: list[float], cost: float, seed: int) -> bool:
        """Keep the finite errors of a point's seeds so far; return whether its mean cost is in the worst quarter."""
        trial.set_user_attr(ERRORS, errors)
        trial.report(cost, step=seed)
        return trial.should_prune()

    @patiently
    def cost(self, trial: Trial, seconds: float, passes: float) -> None:
        """Keep what a point has cost."""
        trial.set_user_attr(SECONDS, seconds)
        trial.set_user_attr(PASSES, passes)

    def ended(self) -> dict[int, FrozenTrial]:
        """Return the trial of each point that is done, in the grid's order."""
        trials = self.trials(TrialState.COMPLETE, TrialState.PRUNED)
        return dict(sorted({trial.user_attrs[POINT]: trial for trial in reversed(trials)}.items()))

    def points(self) -> list[dict[str, Any]]:
        """Return the points that are done as plain data: values, errors per seed in per cent, whether dropped."""
        return [
            {
                "values": self.stage.points()[index],
                "errors": trial.user_attrs.get(ERRORS, []),
                "error": None if finite(trial.value) is None else fmean(trial.user_attrs[ERRORS]),
                "cost": finite(trial.value),
                "seconds": trial.user_attrs.get(SECONDS, 0.0),
                "passes": trial.user_attrs.get(PASSES, 0.0),
                "dropped": trial.state is TrialState.PRUNED,
            }
            for index, trial in self.ended().items()
        ]

    def best(self) -> dict[str, Value]:
        """Return the point with the lowest value, the first in the grid's order among equals.

        Raises:
            LabError: points failed.
        """
        ended, points = self.ended(), self.stage.points()
        lost = [point for index, point in enumerate(points) if index not in ended]
        if lost and not self.is_over():
            reasons = {trial.user_attrs.get(REASON, "its workers died") for trial in self.trials(TrialState.FAIL)}
            raise LabError(
                f"{len(lost)} of {len(points)} points of stage {self.stage.name} failed, the first {lost[0]} "
                f"({'; '.join(sorted(reasons - {TWIN, INTERRUPTED}))}); the same command tries again"
            )
        return points[min((trial.value, i) for i, trial in ended.items() if trial.state is TrialState.COMPLETE)[1]]


def open_storage(url: str, heartbeat: int = HEARTBEAT, attempts: int = 5) -> RDBStorage:
    """Return the storage of a URL (sqlite:///FILE, postgresql://..., mysql://...); make missing tables.

    Workers that start together make the tables together, so it takes some attempts.

    Raises:
        LabError: it cannot be opened; the message is without user and password.
    """
    sqlite = url.startswith("sqlite")
    options: dict[str, Any] = {"connect_args": {"timeout": 120}} if sqlite else {"pool_pre_ping": True}
    try:
        if sqlite:
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with catch_warnings(action="ignore", category=ExperimentalWarning):
            storage = RDBStorage(url, options, heartbeat_interval=heartbeat, grace_period=3 * heartbeat)
        return _with_one_writer(storage) if sqlite else storage
    except (SQLAlchemyError, StorageInternalError, ImportError, ValueError, OSError, RuntimeError) as error:
        if attempts == 1 or isinstance(error, ImportError | ValueError):
            reason = str(_cause(error)).splitlines()[0].replace(url, shown(url))
            raise LabError(f"cannot open storage {shown(url)}: {reason}") from error
    time.sleep(6.4 / 2**attempts)  # 0.2 to 1.6 seconds
    return open_storage(url, heartbeat, attempts - 1)


def shown(url: str) -> str:
    """Return the URL without user, password and options, which may hold a password too."""
    head, at, tail = url.partition("?")[0].rpartition("@")
    return f"{head.split('//')[0]}//...@{tail}" if at else tail


def _with_one_writer(storage: RDBStorage) -> RDBStorage:
    """Take SQLite's write lock before the first read of a transaction: it has no row locks to claim a trial with."""

    @event.listens_for(storage.engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver begins no transaction

    @event.listens_for(storage.engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    storage.engine.dispose()  # connections made before lack these settings
    return storage
