"""Files that are whole at every moment: a reader finds the old content or the new, never half of either.

:func:`write` is the one writer of the laboratory. :func:`hold` keeps two commands out of one directory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, get_origin, get_type_hints

from filelock import FileLock, Timeout

from steppe.lab.errors import LabError

FORMAT = 1
LOCK = ".lock"  # in a directory that a command works in
T = TypeVar("T")


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace a file in one step, so that it survives ``kill -9`` and a power cut.

    ``content`` is text, bytes, or a function that writes to an open binary file. It goes to a temporary file beside the
    target; both it and the renaming are synced to the disk.

    Raises:
        LabError: the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name == "posix":  # other systems open no folders
                _sync_folder(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing a file into a ``LabError`` that names it."""
    try:
        yield
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object and the number of its format."""
    write(path, json.dumps({"format": FORMAT, **data}, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that :func:`write_json` wrote, without the number of its format.

    Raises:
        ValueError: the file is damaged; the caller knows what to do about that.
        LabError: a newer steppe wrote it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"not a whole JSON file: {error}") from error
    return without_format(path, data)


def without_format(path: Path, data: Any) -> dict[str, Any]:
    """Return the data of a file without the number of its format.

    Raises:
        ValueError: this is no data of the format that this steppe reads.
        LabError: a newer steppe wrote it.
    """
    found = data.pop("format", None) if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise LabError(f"{path} has format {found}, of a newer steppe; this one reads format {FORMAT}. Update steppe")
    if found != FORMAT:
        raise ValueError(f"not a file of format {FORMAT}")
    return data  # type: ignore[no-any-return] # found is not None, so it is a dict


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def save(path: Path, value: Any) -> None:
    """Write a dataclass, which :func:`load` reads."""
    write_json(path, asdict(value))


def load(path: Path, kind: type[T]) -> T:
    """Return the dataclass that :func:`save` wrote.

    Raises:
        ValueError: the file is damaged, or a field is missing, unknown or of another type.
        LabError: a newer steppe wrote it.
    """
    return _built(kind, read_json(path))


def _built(kind: type[T], data: dict[str, Any]) -> T:
    hints = get_type_hints(kind)
    values = {
        name: _built(hints[name], value) if is_dataclass(hints.get(name)) and isinstance(value, dict) else value
        for name, value in data.items()
    }
    if wrong := [name for name, value in values.items() if name in hints and not _fits(value, hints[name])]:
        raise ValueError(f"{', '.join(wrong)}: values of another type")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error).replace(f"{kind.__name__}.__init__() ", "")) from error


def _fits(value: object, kind: Any) -> bool:
    kind = get_origin(kind) if get_origin(kind) in (dict, list) else kind
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def finite(value: float | None) -> float | None:
    """Return the value, or ``None`` if it is not a finite number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def clean(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        leftover.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a directory for this process; the lock ends with the process, however it ends, on every system.

    Raises:
        LabError: another process holds it, or it cannot be written in.
    """
    if folder.exists() and not folder.is_dir():
        raise LabError(f"{folder} is a file; choose a directory by --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise LabError(f"another command works in {folder}; wait for it, or choose another --out") from None
    except OSError as error:
        raise LabError(f"cannot write in {folder}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            (folder / LOCK).unlink()
        lock.release()
        with suppress(OSError):  # a mistake leaves no empty folder
            for path in made:
                path.rmdir()
