"""A run's numbers while it goes on: JSON lines, and TensorBoard events where they are wanted."""

import json
from pathlib import Path
from typing import Any

from steppe.lab.record import finite, write_text
from steppe.lab.settings import LabError


class Metrics:
    """Appends to `metrics.jsonl`: one object a line, each with the step it was made after.

    Args:
        folder: the run directory.
        step: lines of later steps are dropped; they are made again when a run goes on from its checkpoint.
        tensorboard: write events to `folder/tensorboard` as well.

    Raises:
        LabError: TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in read(self.path) if line["step"] <= step))
        self.file = self.path.open("a", encoding="utf-8")
        self.events: Any = _events(folder / "tensorboard", step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null."""
        line = {key: finite(value) if isinstance(value, float) else value for key, value in line.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items() if self.events else ():
            if isinstance(value, int | float) and name != "step":
                self.events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is still held back."""
        self.file.close()
        if self.events:
            self.events.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file; a last one that a killed process left half written is no line."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines += [line] if isinstance(line, dict) and isinstance(line.get("step"), int) else []
    return lines


def _events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise LabError(f'events need TensorBoard ({error}): pip install "steppe[tensorboard]"') from None
    return SummaryWriter(str(folder), purge_step=step + 1)
