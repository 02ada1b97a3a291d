"""Options that several commands share."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from steppe.lab.settings import Settings

Data = Annotated[str, typer.Option(help="A source that `steppe doctor` lists, or module:function.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: an accelerator if there is one.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]
Baseline = Annotated[str | None, typer.Option(help="The method that others are compared to.", show_default="the first")]
Folder = Annotated[Path, typer.Argument(help="A run directory of any command.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Optuna storage for machines to share: postgresql://HOST/DB.",
        envvar="STEPPE_STORAGE",  # keeps a password out of the list of processes
        show_default="SQLite in OUT",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one a core")]


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an option for each setting that has one; it gets their values as the dict ``given``."""
    settings = {one.name: one for one in fields(Settings) if one.metadata.get("option")}

    @wraps(command)
    def wrapped(**options: Any) -> None:
        command(given={name: options.pop(name) for name in settings}, **options)

    kept = [one for one in signature(command).parameters.values() if one.name != "given"]
    for name, one in settings.items():
        kind: Any = one.type
        option = Annotated[kind | None, typer.Option(help=one.metadata["option"])]
        kept.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option))
    wrapped.__signature__ = Signature(kept)  # type: ignore[attr-defined] # what Typer reads
    wrapped.__annotations__ = {one.name: one.annotation for one in kept}
    return wrapped
