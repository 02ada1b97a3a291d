"""What the commands share."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from steppe.lab.settings import LabError


@contextmanager
def told(console: Console) -> Iterator[None]:
    """Tell a mistake in what was asked for without a traceback."""
    try:
        yield
    except LabError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
