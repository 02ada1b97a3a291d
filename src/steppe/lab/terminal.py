"""What the commands print: lines, the table of a summary, and the progress of long work."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from steppe.lab.summary import Summary

_NAME = 16  # columns that the first column of a table needs, where its texts break
SHORT = {"difference": "diff.", "seconds": "s"}  # headers for a terminal of 80 columns


def line(console: Console, text: str) -> None:
    """Print one line as it is, without markup, colours or breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def bullets(console: Console, texts: Iterable[str]) -> None:
    """Print texts as the items of a list, as they are."""
    for text in texts:
        console.print(f"- {text}", markup=False, highlight=False)


def show(found: "Summary", console: Console) -> None:
    """Print the table of a summary and its notes."""
    from steppe.lab import tables

    headers, rows = tables.table(found)
    title, caption = tables.title(found), tables.caption(found)
    table(console, [SHORT.get(header, header) for header in headers], rows, title, caption)
    bullets(console, tables.notes(found))


def table(
    console: Console, headers: list[str], rows: list[list[str]], title: str | None = None, caption: str | None = None
) -> None:
    """Print a table: text to the left in its first column, numbers to the right in the others.

    A terminal too narrow for its numbers gets a paragraph for each row instead, so that nothing is cut.
    """
    columns = [*zip(headers, *rows, strict=True)]
    if console.width < _NAME + sum(1 + max(map(cell_len, column)) for column in columns[1:]):
        _paragraphs(console, headers, rows, title, caption)
        return
    made = Table(title=title, caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for i, header in enumerate(headers):
        made.add_column(header, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for cells in rows:
        made.add_row(*map(Text, cells))
    console.print(made)


def _paragraphs(
    console: Console, headers: list[str], rows: list[list[str]], title: str | None, caption: str | None
) -> None:
    said = [[f"{header} {cell}" for header, cell in zip(headers, cells, strict=True) if cell] for cells in rows]
    told = [f"{cells[0]}: {'; '.join(parts[1:])}" for cells, parts in zip(rows, said, strict=True)]
    for text in (title, *told, caption):
        if text:
            console.print(text, markup=False, highlight=False, overflow="fold")


class Display:
    """Bars with the time left, for one piece of work and its parts; plain lines if the output is no terminal.

    ``total`` is the amount of work, in any unit; ``None`` until :meth:`update` says it.

    Example:
        >>> with Display(Console(), "steps", total=100) as display:
        ...     display.update(50, note="loss 0.1")
    """

    def __init__(self, console: Console, name: str, total: float | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.console, hidden = console, not console.is_terminal
        times = TimeRemainingColumn()
        self.bars = Progress(*columns, times, console=console, disable=hidden, speed_estimate_period=600)
        self.whole = self.bars.add_task(name, total=total, note="")
        self.parts: dict[str, tuple[TaskID, float]] = {}

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.bars.stop()

    def update(self, completed: float | None = None, total: float | None = None, note: str | None = None) -> None:
        """Show how much of the whole work is done, and a note beside it; ``None`` leaves a value as it is."""
        self.bars.update(self.whole, completed=completed, total=total)
        if note is not None:
            self.bars.update(self.whole, note=note)

    def part(self, name: str, completed: float, total: float, note: str = "") -> None:
        """Show how much of a part is done and add it to the whole; a part that is done leaves the display."""
        if name not in self.parts:
            self.parts[name] = (self.bars.add_task(name, total=total, note=note), 0.0)
        bar, before = self.parts[name]
        self.parts[name] = (bar, completed)
        self.bars.update(self.whole, advance=completed - before)
        self.bars.update(bar, completed=completed, note=note, visible=completed < total)

    def line(self, text: str, always: bool = True) -> None:
        """Print a line above the bars; with ``always=False`` only if the output is no terminal."""
        if always or not self.console.is_terminal:
            line(self.console, text)
