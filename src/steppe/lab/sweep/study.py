"""One stage in an Optuna storage: points are claimed once, a dead worker's point is claimed again, nothing is lost.

Every point of the grid is a waiting trial from the start, so that claiming one is a change of state in one
transaction. A worker that trains a point sends heartbeats; where they stop, for a killed process or a lost machine,
any other worker declares the trial failed and queues its point once more.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import PercentilePruner
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from steppe.lab.settings import LabError
from steppe.lab.sweep.space import Stage, Value
from steppe.lab.sweep.storage import HEARTBEAT, known_experimental

RETRIES = 3  # of a point whose worker died, lest a point that kills its workers is tried for ever
DROP = PercentilePruner(percentile=75.0, n_startup_trials=4)
POINT, REASON = "point", "reason"
TWIN = "queued twice"


@dataclass(frozen=True)
class Grid:
    """A stage's points in a storage."""

    study: optuna.Study
    storage: RDBStorage
    stage: Stage

    @classmethod
    def open(cls, storage: RDBStorage, name: str, stage: Stage) -> "Grid":
        """Create or join the study called `name`, and queue the points that it lacks or that failed.

        A point gets no further seed when its mean is in the worst quarter of what finished points had after as many.
        Never within a run: a large radius or learning rate looks bad half-way and ends well.
        """
        study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=DROP)
        grid = cls(study, storage, stage)
        grid.queue(again=True)
        return grid

    def queue(self, again: bool = False) -> None:
        """Queue every point that no trial stands for; one that raised, or that too many workers died of, only `again`.

        Two workers may do so in the same moment; `claim` sorts that out.
        """
        trials = self.study.get_trials(deepcopy=False)
        kinds: dict[str, BaseDistribution] = {
            key: CategoricalDistribution(choices) for key, choices in self.stage.grid.items()
        }
        for index, point in enumerate(self.stage.points()):
            mine = [trial for trial in trials if trial.user_attrs[POINT] == index]
            reasons = [trial.user_attrs.get(REASON) for trial in mine if trial.state is TrialState.FAIL]
            deaths, raised = reasons.count(None), any(reason not in (None, TWIN) for reason in reasons)
            if len(mine) == len(reasons) and (again or (deaths <= RETRIES and not raised)):
                waiting = create_trial(
                    state=TrialState.WAITING, params=point, distributions=kinds, user_attrs={POINT: index}
                )
                self.study.add_trial(waiting)

    def claim(self) -> Trial | None:
        """Return a waiting trial that is now this worker's alone, or None where none is waiting."""
        with known_experimental():
            fail_stale_trials(self.study)
        self.queue()
        for found in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            trial = self._id(found.number)
            self.storage.record_heartbeat(trial)  # first, so that no claimed trial is without one
            if self._taken(trial):
                if not self._twin(found):
                    return Trial(self.study, trial)
                self.tell(Trial(self.study, trial), None, TrialState.FAIL, TWIN)
        return None

    def _taken(self, trial: int) -> bool:
        try:
            return self.storage.set_trial_state_values(trial, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _twin(self, found: FrozenTrial) -> bool:
        """Tell whether an earlier trial stands for the same point."""
        earlier = self.study.get_trials(deepcopy=False)[: found.number]
        same = [trial for trial in earlier if trial.user_attrs[POINT] == found.user_attrs[POINT]]
        return any(trial.state is not TrialState.FAIL for trial in same)

    def _id(self, number: int) -> int:
        study = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study, number)

    @contextmanager
    def beating(self, trial: Trial) -> Iterator[None]:
        """Send heartbeats while the body runs."""
        stop = threading.Event()
        pulse = threading.Thread(target=_beat, args=(self.storage, self._id(trial.number), stop), daemon=True)
        pulse.start()
        try:
            yield
        finally:
            stop.set()
            pulse.join()

    def tell(self, trial: Trial, value: float | None, state: TrialState, reason: str = "") -> None:
        """End a trial; nothing happens where it was declared dead meanwhile, because another worker has its point."""
        try:
            if reason:
                trial.set_user_attr(REASON, reason)
            self.study.tell(trial, value, state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            return

    def ended(self) -> dict[int, FrozenTrial]:
        """Return the trial that stands for each point that is done."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return {trial.user_attrs[POINT]: trial for trial in reversed(trials)}

    def waiting(self) -> int:
        """Return how many trials wait to be claimed."""
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def under_way(self) -> bool:
        """Tell whether any trial is waiting or being trained."""
        return bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING)))

    def best(self) -> dict[str, Value]:
        """Return the point with the lowest value, the first in the grid's order among equals."""
        ended, points = self.ended(), self.stage.points()
        if lost := [point for index, point in enumerate(points) if index not in ended]:
            failed = self.study.get_trials(deepcopy=False, states=(TrialState.FAIL,))
            reasons = {trial.user_attrs.get(REASON, "its workers died") for trial in failed} - {TWIN}
            raise LabError(
                f"{len(lost)} of {len(points)} points of stage {self.stage.name} failed, the first {lost[0]} "
                f"({'; '.join(sorted(reasons))}); the same command tries again"
            )
        values = {index: trial.value for index, trial in ended.items() if trial.value is not None}
        whole = {i: value for i, value in values.items() if ended[i].state is TrialState.COMPLETE}
        return points[min(whole, key=lambda index: (whole[index], index))]


def _beat(storage: RDBStorage, trial: int, stop: threading.Event) -> None:
    while True:
        storage.record_heartbeat(trial)
        if stop.wait(storage.get_heartbeat_interval() or HEARTBEAT):
            return
