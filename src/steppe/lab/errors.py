"""Mistakes of the user as errors, and every error as one line."""

import os
import re
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

DEBUG = "STEPPE_DEBUG"  # set: unexpected errors, and runs that fail, show their traceback
_FEW = 8  # names that a line shows beside the nearest one


class LabError(Exception):
    """A mistake in what the user asked for; the command line prints its message without a traceback."""


class PausedError(Exception):
    """The time of this command is over; everything is kept, and the same command continues."""


class NotFiniteError(LabError):
    """A run ended with a metric that is not a finite number."""


def unknown(problem: str, word: str, known: Iterable[str]) -> LabError:
    """Return an error that names the known word nearest to ``word``; all of them if they are few or none is near.

    Example:
        >>> raise unknown("unknown method 'sam'", "sam", ["SGD", "SAM"])
        LabError: unknown method 'sam'; did you mean SAM? choose from SGD, SAM
    """
    by_letters = {re.sub(r"[-_ ]", "", name.lower()): name for name in known}
    near = get_close_matches(re.sub(r"[-_ ]", "", word.lower()), by_letters, n=1)
    told = f" did you mean {by_letters[near[0]]}?" if near else ""
    told += "" if near and len(by_letters) > _FEW else f" choose from {', '.join(by_letters.values())}"
    return LabError(f"{problem};{told}")


def one_line(error: BaseException) -> str:
    """Return an error as one printable line, without the name of the home folder.

    The message of a ``LabError`` says all; of other errors the kind is told, and of a file's error the file.
    """
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
    if (home := str(Path.home())) != "/":
        text = re.sub(rf"{re.escape(home)}(?=[/\\]|$|\W)", "~", text)
    text = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return " ".join(text.split())


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of steppe, which no package index has, so from a clone."""
    return f'in a clone of steppe: pip install -e ".[{extra}]"'


def need(package: str, extra: str) -> None:
    """Raise a ``LabError`` that tells how to install a package if it is missing."""
    if find_spec(package) is None:
        raise LabError(f"this needs {package}; {how_to_install(extra)}")


def reason(error: BaseException) -> str:
    """Return one line that says what was raised, and where unless it is a mistake of the user."""
    return one_line(error) + ("" if isinstance(error, LabError) else f" (at {place(error)})")


def place(error: BaseException) -> str:
    """Return the file and the line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "unknown place"
