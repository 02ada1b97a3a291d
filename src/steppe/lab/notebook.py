"""The laboratory in Python: ``steppe run`` and ``steppe compare`` as functions, and their results as tables.

    from steppe.lab import notebook
    folder = notebook.compare(["SGD", "SAM(rho=0.5)"], data="digits", seeds=3, epochs=50)
    pandas.DataFrame(notebook.records(folder)).groupby("method").test_error.agg(["mean", "std"])

``given`` takes any field of :class:`~steppe.lab.settings.Settings`; what is ``None`` has the default of the data. A
script that calls :func:`compare` needs the usual ``if __name__ == "__main__":``, because runs are processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steppe.lab import files, single
from steppe.lab.compare import compare as train_all
from steppe.lab.errors import LabError
from steppe.lab.hardware import CPU, Hardware
from steppe.lab.presets import planned
from steppe.lab.record import Record


def run(
    method: str,
    data: str = "digits",
    seed: int = 0,
    folder: str | Path | None = None,
    hardware: Hardware = CPU,
    **given: Any,
) -> Record:
    """Train one run, or continue it; return its record. Arguments are the options of ``steppe run``.

    Raises:
        LabError: an argument names something unknown or missing.

    Example:
        >>> notebook.run("SAM(rho=0.5)", epochs=20).test_error
    """
    asked = planned(data, given, [method], seeds=1, first=seed).runs()[0]
    return single.run(asked, single.folder_of(asked) if folder is None else Path(folder), hardware)


def compare(
    methods: list[str] | None = None,
    data: str = "digits",
    seeds: int | None = None,
    folder: str | Path | None = None,
    workers: int | None = None,
    hardware: Hardware = CPU,
    **given: Any,
) -> Path:
    """Train methods over seeds in a directory that ``steppe report`` reads; return it. The same call continues it.

    Raises:
        LabError: an argument names something unknown or missing, or a run failed.
    """
    plan = planned(data, given, methods, seeds=seeds)
    where = Path("runs") / f"compare-{data}" if folder is None else Path(folder)
    if failures := train_all(where, plan, workers, hardware):
        raise LabError(f"{len(failures)} runs failed; the first: {failures[0].reason}")
    return where


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
