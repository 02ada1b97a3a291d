"""The entry point of the command line; ``--version`` and ``--help`` work without the ``lab`` extra."""

import sys
from importlib.util import find_spec

from steppe import __version__
from steppe.lab.commands import COMMANDS
from steppe.lab.errors import how_to_install

_NEEDED = ("numpy", "scipy", "sklearn", "typer", "rich", "jinja2", "optuna", "sqlalchemy")


def main() -> None:
    """Run the command line, or say how to install the packages that it needs."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if not missing:
        from steppe.lab.commands.group import app

        app()
        return
    needs = f"The commands need {', '.join(missing)}; {how_to_install('lab')}"
    if "--version" in sys.argv[1:2]:
        print(f"steppe {__version__}")
    elif sys.argv[1:2] in ([], ["--help"]):
        width = max(map(len, COMMANDS))
        print(
            "Usage: steppe COMMAND\n", *(f"  {name:{width}}  {line}" for name, (_, line) in COMMANDS.items()), sep="\n"
        )
        print(f"\n{needs}")
    else:
        sys.exit(needs)
