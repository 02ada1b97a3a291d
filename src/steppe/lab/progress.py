"""The live display of a comparison."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from steppe.lab.compare import Failure
from steppe.lab.record import Record
from steppe.lab.train import Run


class Display:
    """Finished runs, the epoch of the current ones and the time left; plain lines where there is no terminal."""

    def __init__(self, console: Console, runs: list[Run]) -> None:
        self.console, self.count, self.total = console, 0, len(runs)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        left = TimeRemainingColumn()
        live = console.is_terminal
        self.bars = Progress(*columns, left, console=console, disable=not live, speed_estimate_period=600)
        self.all = self.bars.add_task("all runs", total=sum(run.epochs for run in runs), note=f"0/{self.total}")
        self.current: dict[Run, TaskID] = {}
        self.progressed: dict[Run, float] = {}

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def step(self, run: Run, step: int, steps: int) -> None:
        """Show how far a run has come."""
        epochs = run.epochs * step / steps
        if run not in self.current:
            self.current[run] = self.bars.add_task(_name(run), total=run.epochs, note="")
        self.bars.update(self.current[run], completed=epochs, note=f"epoch {int(epochs)}/{run.epochs}")
        self._advance(run, epochs)

    def done(self, run: Run, result: Record | Failure) -> None:
        """Take a run off the display and count it; say what became of it."""
        self.count += 1
        self._advance(run, run.epochs)
        self.bars.update(self.all, note=f"{self.count}/{self.total}")
        if run in self.current:
            self.bars.remove_task(self.current.pop(run))
        if isinstance(result, Failure):
            self.console.print(f"{_name(run)} failed: {result.reason}", style="red", markup=False)
        elif not self.console.is_terminal:
            collapsed = ", collapsed" if result.collapsed else ""
            line = f"{_name(run)}: error {100 * result.test_error:.1f} %, {result.seconds:.1f} s{collapsed}"
            self.console.print(f"{self.count}/{self.total} {line}", markup=False, highlight=False)

    def _advance(self, run: Run, epochs: float) -> None:
        self.progressed[run] = epochs
        self.bars.update(self.all, completed=sum(self.progressed.values()))


def _name(run: Run) -> str:
    return f"{run.method} seed {run.seed}"
