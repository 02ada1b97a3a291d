"""Write docs/reference/cli.md, the help of every command: ``python tools/cli_page.py``."""

import os
import subprocess
import sys
from pathlib import Path

from steppe.lab.commands import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"


def help_of(*command: str) -> str:
    """Return what ``steppe COMMAND --help`` prints, 100 columns wide, without colours."""
    plain = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    found = subprocess.run(
        [sys.executable, "-m", "steppe", *command, "--help"], capture_output=True, text=True, check=True, env=plain
    )
    shown = found.stdout.replace("python -m steppe", "steppe").strip("\n")
    return "\n".join(line.rstrip() for line in shown.splitlines())


def page() -> str:
    """Return the page's text."""
    parts = ["# Command line\n\nWhat `steppe COMMAND --help` prints. `python -m steppe` is the same command.\n"]
    parts += [f"## steppe {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
