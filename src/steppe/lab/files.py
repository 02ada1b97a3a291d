"""Files that are whole at every moment: a reader finds the old content or the new, never half of either.

:func:`write` is the one writer of the laboratory. :func:`hold` keeps two commands out of one directory.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from steppe.lab.errors import LabError

FORMAT = 1


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], object]) -> None:
    """Replace a file in one step, so that it survives ``kill -9`` and a power cut.

    The content goes to a temporary file beside the target; both it and the renaming are synced to the disk.

    Args:
        path: the target; its folder is made if it is missing.
        content: text, bytes, or a function that writes to an open binary file.

    Raises:
        LabError: the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a renaming durable, on systems that open folders."""
    if os.name == "posix":
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
    except (OSError, ValueError) as error:
        raise ValueError(f"not a whole JSON file: {error}") from error
    found = data.pop("format", None) if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise LabError(f"{path} has format {found}, of a newer steppe; this one reads format {FORMAT}. Update steppe")
    if found != FORMAT:
        raise ValueError(f"not a file of format {FORMAT}")
    return data  # type: ignore[no-any-return] # found is not None, so it is a dict


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def finite(value: float | None) -> float | None:
    """Return the value, or ``None`` if it is not a finite number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def clean(folder: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        leftover.unlink(missing_ok=True)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a directory for this process; the lock ends with the process, however it ends.

    Raises:
        LabError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no locks on folders
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(f"another command works in {folder}; wait for it, or choose another --out") from None
        yield
    finally:
        os.close(handle)
        with suppress(OSError):  # a mistake leaves no empty folder
            for path in made:
                path.rmdir()
