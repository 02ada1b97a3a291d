"""Write docs/reference/cli.md, the help of every command: ``python tools/cli_page.py``."""

from pathlib import Path

from typer.testing import CliRunner

from steppe.lab.commands import COMMANDS
from steppe.lab.commands.group import app

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
PLAIN = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}


def help_of(name: str) -> str:
    """Return what ``steppe NAME --help`` prints, 100 columns wide, without colours."""
    shown = CliRunner().invoke(app, [name, "--help"], prog_name="steppe", env=PLAIN).output
    return "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())


def page() -> str:
    """Return the page's text."""
    parts = ["# Command line\n\nWhat `steppe COMMAND --help` prints. `python -m steppe` is the same command.\n"]
    parts += [f"## steppe {name}\n\n```text\n{help_of(name)}\n```\n" for name in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
