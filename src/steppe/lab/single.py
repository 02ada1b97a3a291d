"""One run in a directory of its own that can be left at any time and continued, bit for bit.

run.json        what runs here: method, seed, settings
checkpoint.pt   everything to go on from; at the end, the trained weights
metrics.jsonl   what was measured on the way
record.json     the finished run, as `steppe compare` records it
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from steppe.lab import checkpoint, record, spec
from steppe.lab.metrics import Metrics
from steppe.lab.place import CPU, Hardware
from steppe.lab.record import Record
from steppe.lab.settings import LabError, Settings, differences
from steppe.lab.train import Run, Session, fit

_LOG_EVERY = 20  # steps between two lines of metrics; reading a loss waits for the device
_LEAST = 100  # steps between two checkpoints of runs with short epochs

Watch = Callable[[Session, dict[str, Any]], None]


def run(
    asked: Run,
    folder: Path,
    hardware: Hardware = CPU,
    save_every: int | None = None,
    tensorboard: bool = False,
    watch: Watch = lambda session, line: None,
) -> Record:
    """Train one run in `folder`, or go on with it from its last checkpoint; return its record.

    On the same machine and number of processes, a continued run ends with the same weights as an uninterrupted one,
    bit for bit, also after `kill -9` in the middle of writing.

    Args:
        asked: the method, seed and settings.
        folder: the run directory; empty, missing, or holding this very run.
        hardware: what it runs on.
        save_every: steps between two checkpoints; None is an epoch, or 100 steps where an epoch is shorter.
        tensorboard: write TensorBoard events too.
        watch: called with the session and every line of metrics, in the first process.

    Raises:
        LabError: the folder holds something else, or the data, the model or the hardware are not there.

    Example:
        >>> found = run(Run(spec.parse("SAM(rho=0.2)"), 0, Settings()), Path("runs/digits"))
    """
    place = hardware.open()
    check_folder(folder, asked)
    done = folder / "record.json"
    if done.exists():
        return _read(done)
    session = Session(asked, place)
    place.on_first(lambda: _create(folder, asked))
    saved = folder / "checkpoint.pt"
    if saved.exists():
        session.restore(checkpoint.read(saved))
    metrics = Metrics(folder, session.step, tensorboard) if place.first else None
    every = save_every or max(asked.settings.steps_per_epoch, _LEAST)

    def tell(line: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(line)
            watch(session, line)

    def keep(session: Session) -> None:
        if session.step % every == 0 or session.step == session.steps:
            state = session.state()
            place.on_first(lambda: checkpoint.write(saved, state))

    try:
        _fit(session, tell, keep)
    finally:
        if metrics is not None:
            metrics.close()
    found = session.record()
    place.on_first(lambda: record.save(done, found))
    return found


def _fit(session: Session, tell: Callable[[dict[str, Any]], None], keep: Callable[[Session], None]) -> None:
    group = session.optimizer.param_groups[0]

    def progress(step: int, steps: int) -> None:
        if step % _LOG_EVERY == 0 or step == steps:
            rate = {"lr": float(group["lr"])} | ({"rho": float(group["rho"])} if "rho" in group else {})
            tell({"step": step, "loss": session.last_loss(), **rate})

    def evaluated(epoch: int, error: float) -> None:
        tell({"step": session.step, **session.meter.latest(), "seconds": session.meter.seconds})

    fit(session, progress, evaluated, keep)


def folder_of(asked: Run) -> Path:
    """Return the directory of a run that names none."""
    return Path("runs") / f"{asked.settings.data.replace(':', '.')}-{asked.method.slug}-s{asked.seed}"


def check_folder(folder: Path, asked: Run) -> None:
    """Raise a `LabError` where a directory holds another run or something else."""
    if (folder / "run.json").exists():
        if changed := _changes(read_run(folder), asked):
            raise LabError(f"{folder} holds another run: {'; '.join(changed)}. Choose another --out")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LabError(f"{folder} exists and holds no run (no run.json). Choose another --out")


def _create(folder: Path, asked: Run) -> None:
    """Create the run directory, or clean up after writers that were killed in it."""
    path = folder / "run.json"
    if not path.exists():
        settings = asked.settings.to_dict()
        record.write_json(path, {"method": str(asked.method), "seed": asked.seed, "settings": settings})
    record.clean(folder)


def read_run(folder: Path) -> Run:
    """Return what runs in a directory."""
    try:
        data = record.read_json(folder / "run.json")
        return Run(spec.parse(data["method"]), int(data["seed"]), Settings(**data["settings"]))
    except (ValueError, TypeError, KeyError) as error:
        raise LabError(f"{folder / 'run.json'} is damaged: {error}") from None


def _changes(old: Run, new: Run) -> list[str]:
    changed = [
        f"{name} was {getattr(old, name)}, now {getattr(new, name)}"
        for name in ("method", "seed")
        if getattr(old, name) != getattr(new, name)
    ]
    return changed + differences(old.settings, new.settings)


def _read(path: Path) -> Record:
    try:
        return record.read(path)
    except ValueError as error:
        raise LabError(f"{path} is damaged: {error}") from None
