"""A process of a search whose runs take a moment and are logged."""

import os
import time
from types import SimpleNamespace

from steppe.lab.settings import Settings
from steppe.lab.sweep import work
from steppe.lab.sweep.space import Search, Stage

LRS = tuple(round(0.01 * k, 2) for k in range(1, 17))
TWO_STAGES = Search(
    Settings(validation=0.1, test_seed=0),
    (Stage("base", "SGD", {"lr": LRS}), Stage("radius", "SAM(rho={rho})", {"rho": (0.1, 0.2, 0.3)})),
)


def result(error):
    """Return what the search reads of a record."""
    return SimpleNamespace(shown=100 * error, cost=100 * error, seconds=1.0, passes=2.0)


def logged(log, seconds):
    """Stand in for training: the error is the learning rate's distance from 0.05, or rho."""

    def write(word, run):
        with open(log, "a") as file:  # one short append is one write
            file.write(f"{word} {os.getpid()} {run.method} lr={run.settings.lr}\n")

    def train(run, site):
        write("start", run)
        time.sleep(seconds)
        write("end", run)
        rho = dict(run.method.options).get("rho")
        return result(abs(run.settings.lr - 0.05) if rho is None else rho)

    return train


def search_two_stages(url, log, seconds):
    work.train = logged(log, seconds)
    site = work.Worksite(url, "test", log.parent, heartbeat=1)
    print(work.search(TWO_STAGES, site)[0])
