"""The laboratory in Python: ``steppe run`` and ``steppe compare`` as functions, and their results as tables.

    from steppe.lab import notebook
    def task():
        return {"train": (x, y), "test": (x_test, y_test), "model": make_model, "loss": loss_of_each_example}
    folder = notebook.compare(["SAM", "SAM(m={m}, sampled=1)"], task)
    pandas.DataFrame(notebook.outcomes(folder))

``given`` takes any field of :class:`~steppe.lab.settings.Settings`; what is ``None`` has the default of the task. One
worker, the default, is this process. More are processes that import the task: a script that asks for them needs
``if __name__ == "__main__":`` around the call, and the task a module of its own.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from steppe.lab import data, fair, files, importing, single
from steppe.lab.compare import compare as train_all
from steppe.lab.errors import LabError
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.presets import asked, planned
from steppe.lab.record import Record
from steppe.lab.sweep.space import parse

Task = str | Callable[[], Any]
_GUARD = 'several workers need `if __name__ == "__main__":` around the call in a script; or leave workers out'


def run(
    method: str,
    task: Task = "digits",
    seed: int = 0,
    folder: str | Path | None = None,
    hardware: Hardware = CPU,
    **given: Any,
) -> Record:
    """Train one run, or continue it; return its record. Arguments are the options of ``steppe run``.

    Args:
        task: the name of data, ``module:function``, or a function that returns a task
            (:class:`~steppe.lab.own.OwnTask`).

    Raises:
        LabError: an argument names something unknown or missing.

    Example:
        >>> notebook.run("SAM(rho=0.5)", epochs=20).test_error
    """
    one = planned(_name(task), given, [method], seeds=1, first=seed).runs()[0]
    return single.run(one, single.folder_of(one) if folder is None else Path(folder), hardware)


def compare(
    methods: list[str] | None = None,
    task: Task = "digits",
    seeds: int | None = None,
    folder: str | Path | None = None,
    workers: int = 1,
    hardware: Hardware = CPU,
    fixed: bool = False,
    trials: int | None = None,
    equal: str = "passes",
    spaces: Mapping[str, str] | None = None,
    **given: Any,
) -> Path:
    """Compare methods as ``steppe compare`` does, in a directory that ``steppe report`` reads; return it.

    The same call continues it.

    Args:
        fixed: compare at the given parameters, without a search.
        spaces: what is searched of some parameters, ``{"rho": "0.01..1", "m": "8,16"}``.

    Raises:
        LabError: an argument names something unknown or missing, or a run failed.
    """
    name = _name(task)
    _check_workers(workers, name)
    where = Path("runs") / f"compare-{name.replace(':', '.')}" if folder is None else Path(folder)
    try:
        if fixed:
            failures = train_all(where, planned(name, given, methods, seeds=seeds), workers, hardware)
        else:
            chosen = dict(parse(f"{key}={text}") for key, text in (spaces or {}).items())
            question = asked(name, given, methods, seeds, trials=trials, equal=equal, spaces=chosen)
            failures = fair.run(where, question, workers, hardware)
    except BrokenExecutor:
        raise LabError(f"a worker process was lost; {_GUARD}") from None
    if failures:
        raise LabError(f"{len(failures)} of the runs failed, the first: {failures[0].reason}; {where} holds the others")
    return where


def _name(task: Task) -> str:
    data.forget()
    return importing.name_of(task)


def _check_workers(workers: int, name: str) -> None:
    if workers == 1:
        return
    if multiprocessing.parent_process() is not None:  # a worker imports the script that started it
        raise SystemExit(_GUARD)
    if name in importing.HERE:
        raise LabError(f"other processes cannot import {name}: put it into a module, or leave workers out")


def outcomes(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each method of a fair comparison, for ``pandas.DataFrame``: results, choices, cost."""
    from steppe.lab.report import fair as report

    found = report.read(Path(folder))
    if found is None:
        raise LabError(f"{folder} holds no fair comparison that has been searched")
    return report.plain(found)


def records(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each finished run under ``folder``, for ``pandas.DataFrame``; settings are columns."""
    nested = ("settings", "curves", "environment")
    rows = (vars(found) | {"passes": found.passes} | found.settings | vars(found) for found in _found(Path(folder)))
    return [{key: value for key, value in row.items() if key not in nested} for row in rows]


def curves(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each evaluation of each finished run under ``folder``."""
    return [
        {"method": found.method, "seed": found.seed} | dict(zip(found.curves, point, strict=True))
        for found in _found(Path(folder))
        for point in zip(*found.curves.values(), strict=True)
    ]


def _found(folder: Path) -> Iterator[Record]:
    if not folder.is_dir():
        raise LabError(f"no folder {folder}")
    for path in sorted([*folder.rglob("runs/*.json"), *folder.rglob("record.json")]):  # record.json: of 0.1's `run`
        try:
            yield files.load(path, Record)
        except ValueError as error:
            raise LabError(f"{path} is damaged: {error}") from None
