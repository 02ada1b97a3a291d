"""The command line; every command lives beside what it runs."""

import sys
from importlib.util import find_spec

_NEEDED = ("numpy", "scipy", "sklearn", "typer", "rich", "plotly", "jinja2", "matplotlib", "optuna", "sqlalchemy")


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f'steppe\'s command line needs {", ".join(missing)}: pip install "steppe[lab]"')
    from steppe.lab.commands import app
    from steppe.sde.commands import sde
    from steppe.toy.commands import toy

    app.command()(sde)
    app.command()(toy)
    app()
