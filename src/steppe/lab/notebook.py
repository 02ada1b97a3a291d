"""The laboratory in Python: ``steppe run`` and ``steppe compare`` as functions, and their results as tables.

    from steppe.lab import notebook
    folder = notebook.compare(["SGD", "SAM(rho=0.5)"], data="digits", seeds=3, epochs=50)
    pandas.DataFrame(notebook.records(folder)).groupby("method").test_error.agg(["mean", "std"])

A script that calls :func:`compare` needs the usual ``if __name__ == "__main__":``, because runs are processes.
"""

from pathlib import Path
from typing import Any

from steppe.lab import record, single
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
    """Train one run, or continue it; return its record.

    Args:
        method: such as "SAM(rho=0.2, m=16)".
        data: a source by name, or your "module:function".
        seed: decides split, noise, initial weights and order.
        folder: the run directory; runs/DATA-METHOD-sSEED if ``None``.
        hardware: what it runs on.
        given: any field of :class:`~steppe.lab.settings.Settings`.

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
    """Train several methods over several seeds in a directory that ``steppe report`` reads; return it.

    Args:
        methods: such as "SAM(rho=0.2, m=16)"; the data's default methods if ``None``.
        data: a source by name, or your "module:function".
        seeds: how many.
        folder: the run directory; runs/compare-DATA if ``None``. The same call continues it.
        workers: processes; one for each core if ``None``.
        hardware: what every process runs on.
        given: any field of :class:`~steppe.lab.settings.Settings`.

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
    return [_row(found) for found in _records(Path(folder))]


def curves(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each evaluation of each finished run under ``folder``."""
    return [
        {"method": found.method, "seed": found.seed} | dict(zip(found.curves, point, strict=True))
        for found in _records(Path(folder))
        for point in zip(*found.curves.values(), strict=True)
    ]


def _records(folder: Path) -> list[Record]:
    if not folder.is_dir():
        raise LabError(f"no folder {folder}")
    found = []
    for path in sorted([*folder.rglob("runs/*.json"), *folder.rglob("record.json")]):  # record.json: of 0.1's `run`
        try:
            found.append(record.read(path))
        except ValueError as error:
            raise LabError(f"{path} is damaged: {error}") from None
    return found


def _row(found: Record) -> dict[str, Any]:
    kept = {key: value for key, value in vars(found).items() if key not in ("settings", "curves", "environment")}
    return kept | {"passes": found.passes} | {key: v for key, v in found.settings.items() if key not in kept}
