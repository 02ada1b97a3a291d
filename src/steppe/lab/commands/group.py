"""The command line as a Typer app that imports a command's module when the command is called."""

import codecs
import os
import sys
from importlib import import_module
from inspect import cleandoc
from shutil import get_terminal_size
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import steppe
from steppe.lab.commands import COMMANDS
from steppe.lab.errors import DEBUG, LabError, one_line, reason


class Commands(TyperGroup):
    """A group whose commands come from a table, and the one place that prints mistakes, as one line.

    Exit codes: 2 for a mistake, 1 for an unexpected error, 130 for an interruption.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # with their help alone, which lists and completions need
        self.commands = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is called, imported."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _loaded(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Typer's own main says nothing of an interruption."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None

    def main(self, *positional: Any, **options: Any) -> Any:
        """Run the command line, print what goes wrong to the standard error, and exit."""
        self.rich_markup_mode = _markup()
        given = options.get("args")
        options |= {"args": list(sys.argv[1:] if given is None else given) or ["--help"], "standalone_mode": False}
        _tolerate(sys.stdout)
        _tolerate(sys.stderr)
        try:
            code = super().main(*positional, **{"prog_name": "steppe"} | options)
            sys.stdout.flush()
        except (KeyboardInterrupt, typer.Abort):
            code = _told("Stopped. What is finished is kept; the same command continues.", 130)
        except typer.TyperException as error:
            code = _told(f"error: {_usage(error)}", 2)
        except (LabError, OSError) as error:
            code = _told(f"error: {one_line(error)}", 2)
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            code = _told(f"unexpected error: {reason(error)}; {DEBUG}=1 shows the traceback", 1)
        sys.exit(code or 0)


def _told(text: str, code: int) -> int:
    """Print a line to the standard error, and return the exit code."""
    from rich.console import Console

    Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    try:
        sys.stdout.flush()
    except OSError:  # it cannot be written to; Python would say so again at its end
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return code


def _usage(error: typer.TyperException) -> str:
    """Return a mistake in the words of the command line, what to write instead, and where it is explained."""
    text, context = error.format_message().rstrip("."), getattr(error, "ctx", None)
    if near := getattr(error, "possibilities", None):
        text = f"{error.message}; did you mean {' or '.join(near)}?"
    for wrong in getattr(error.__cause__, "errors", list)()[:1]:  # of pydantic, which Typer checks values with
        text += f", got {wrong['input']!r}"
    if text.startswith("Got unexpected extra argument"):
        text += "; a value needs its option before it, such as --method SAM"
    text = text[:1].lower() + " ".join(text[1:].split())
    return f"{text} (see {context.command_path} --help)" if context else text


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for letters that a stream's encoding lacks: a hyphen for a minus sign, ``?`` for others."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join("-" if letter == "\N{MINUS SIGN}" else "?" for letter in lacking), error.end


codecs.register_error("steppe", _spelled)


def _tolerate(stream: Any) -> None:
    """Let a stream of another encoding than UTF-8, such as cp1252, write every text."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="steppe")


def _markup() -> Any:
    """Return how help is set: in boxes, whose columns need room, or as plain paragraphs in a narrow terminal."""
    return "rich" if get_terminal_size().columns >= 100 else None


def _set(text: str) -> str:
    """Return a help text whose prose breaks where the terminal ends and whose examples keep their lines."""
    keep = "" if _markup() else "\b\n"  # how Typer's plain help is told
    paragraphs = cleandoc(text).split("\n\n")
    return "\n\n".join(keep + one if one.startswith(" ") else one.replace("\n", " ") for one in paragraphs)


def _loaded(name: str) -> Any:
    one = typer.Typer(add_completion=False, rich_markup_mode=_markup())
    command = getattr(import_module(COMMANDS[name][0]), name)
    one.command(name, help=_set(command.__doc__))(command)
    return typer.main.get_command(one)


app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)


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
