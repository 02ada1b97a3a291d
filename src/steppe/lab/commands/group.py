"""The command line as a Typer app that imports a command's module when the command is called."""

import errno
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import steppe
from steppe.lab.commands import COMMANDS
from steppe.lab.errors import LabError


class Commands(TyperGroup):
    """A group that lists its commands from a table, and the one place that prints mistakes."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with its help alone, which lists and completions need."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][1]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, imported."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, _loaded(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; print a mistake or an interruption as one line to the standard error.

        Exit codes: 2 for a mistake, 130 for an interruption.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Stopped. What is finished is kept; the same command continues.", err=True)
            raise typer.Exit(130) from None
        except (LabError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:
                raise
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(2) from None


def _loaded(name: str) -> Any:
    one = typer.Typer(add_completion=False)
    one.command(name)(getattr(import_module(COMMANDS[name][0]), name))
    return typer.main.get_command(one)


app = typer.Typer(cls=Commands, no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steppe {steppe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sharpness-aware training: compare methods on real data."""
