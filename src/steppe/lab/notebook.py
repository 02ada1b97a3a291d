"""The laboratory in Python: what `steppe run` and `steppe compare` do, and their results as tables.

    from steppe.lab import notebook
    folder = notebook.compare(["SGD", "SAM(rho=0.5)"], data="digits", seeds=3, epochs=50)
    pandas.DataFrame(notebook.records(folder)).groupby("method").test_error.agg(["mean", "std"])

A script that calls `compare` needs the usual `if __name__ == "__main__":`, because its runs are processes of their own.
"""

import os
from pathlib import Path
from typing import Any

from rich.console import Console

from steppe.lab import directory, record, single, spec, tasks
from steppe.lab.compare import compare as train_all
from steppe.lab.directory import Plan
from steppe.lab.place import CPU, Hardware
from steppe.lab.presets import preset, settings_for
from steppe.lab.progress import Display
from steppe.lab.record import Record
from steppe.lab.settings import LabError
from steppe.lab.train import Run


def run(
    method: str,
    data: str = "digits",
    seed: int = 0,
    folder: str | Path | None = None,
    hardware: Hardware = CPU,
    **given: Any,
) -> Record:
    """Train one run, or go on with it; return its record.

    Args:
        method: such as "SAM(rho=0.2, m=16)".
        data: a source by name, or your own "module:function".
        seed: decides split, noise, initial weights and order.
        folder: the run directory; runs/DATA-METHOD-sSEED without it.
        hardware: what it runs on.
        given: any field of :class:`~steppe.lab.settings.Settings`.

    Raises:
        LabError: something that was asked for is not there.

    Example:
        >>> notebook.run("SAM(rho=0.5)", epochs=20).test_error
    """
    settings = settings_for(preset(data), given)
    asked = Run(spec.parse_all([method], settings)[0], seed, settings)
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
    """Train several methods over several seeds in a directory that `steppe report` reads; return it.

    Args:
        methods: such as "SAM(rho=0.2, m=16)"; the data's usual survey without it.
        data: a source by name, or your own "module:function".
        seeds: how many.
        folder: the run directory; runs/compare-DATA without it. The same call continues it.
        workers: processes; one a core without it.
        hardware: what every process runs on.
        given: any field of :class:`~steppe.lab.settings.Settings`.

    Raises:
        LabError: something that was asked for is not there, or a run failed.
    """
    default = preset(data)
    settings = settings_for(default, given)
    tasks.check(settings)
    chosen = tuple(spec.parse_all(methods or list(default.methods), settings))
    where = Path("runs") / f"compare-{data}" if folder is None else Path(folder)
    asked = Plan(settings, chosen, seeds or default.seeds)
    whole = directory.open_for(where, asked)
    known, _ = directory.finished(where, whole)
    runs = [each for each in asked.runs() if each not in known]
    with Display(Console(), runs) as display:
        failures = train_all(where, runs, workers or os.cpu_count() or 1, display, hardware) if runs else []
    if failures:
        raise LabError(f"{len(failures)} of {len(runs)} runs failed; the first: {failures[0].reason}")
    return where


def records(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each finished run under `folder`, for `pandas.DataFrame`; settings are columns."""
    return [_row(found) for found in _records(Path(folder))]


def curves(folder: str | Path) -> list[dict[str, Any]]:
    """Return one flat row for each evaluation of each finished run under `folder`."""
    return [
        {"method": found.method, "seed": found.seed} | dict(zip(found.curves, point, strict=True))
        for found in _records(Path(folder))
        for point in zip(*found.curves.values(), strict=True)
    ]


def _records(folder: Path) -> list[Record]:
    if not folder.is_dir():
        raise LabError(f"no folder {folder}")
    paths = sorted([*folder.rglob("runs/*.json"), *folder.rglob("record.json")])
    found = []
    for path in paths:
        try:
            found.append(record.read(path))
        except ValueError as error:
            raise LabError(f"{path}: {error}") from None
    return found


def _row(found: Record) -> dict[str, Any]:
    kept = {key: value for key, value in vars(found).items() if key not in ("settings", "curves", "environment")}
    return kept | {"passes": found.passes} | {key: v for key, v in found.settings.items() if key not in kept}
