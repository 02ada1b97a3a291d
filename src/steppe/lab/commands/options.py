"""Options that several commands share."""

import re
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from steppe.lab.commands import names
from steppe.lab.commands.names import completed
from steppe.lab.errors import LabError
from steppe.lab.settings import AUGMENTATIONS, OPTIMIZERS, Settings


def _without_password(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    """Refuse a password among the arguments, which all users of a machine see in its list of processes."""
    source = ctx.get_parameter_source("storage")
    if source is not None and source.name == "COMMANDLINE" and re.search(r"//[^/@]*:|passw\w*=", value or ""):
        raise typer.BadParameter(
            "a password would show in the list of processes; put the URL into the variable STEPPE_STORAGE, or the "
            "password into ~/.pgpass"
        )
    return value


_COMPLETED = {"model": names.MODELS, "optimizer": OPTIMIZERS, "augment": AUGMENTATIONS}
Data = Annotated[
    str,
    typer.Option(help="A source that `steppe doctor` lists, or module:function.", autocompletion=completed(names.DATA)),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the data.")]
OwnTask = Annotated[str | None, typer.Option(help="Your task, module:function; the same as --data.")]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, mps, or auto: an accelerator if there is one, for all but an MLP.",
        autocompletion=completed(names.DEVICES),
    ),
]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.", autocompletion=completed(names.PRECISIONS))]
Baseline = Annotated[
    str | None,
    typer.Option(
        help="The method that others are compared to.",
        show_default="the first",
        autocompletion=completed(names.METHODS),
    ),
]
Folder = Annotated[Path, typer.Argument(help="A run directory of any command.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Optuna storage for machines to share: postgresql://HOST/DB.",
        envvar="STEPPE_STORAGE",
        callback=_without_password,
        show_default="SQLite in OUT",
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine.", show_default="one a core; one on an accelerator")
]


def source_of(data: str, task: str | None) -> str:
    """Return the source of the data: ``--task`` if it is given, else ``--data``."""
    if task is not None and ":" not in task:
        raise LabError(f"--task is a function of yours, module:function, not {task!r}; data by name go with --data")
    if task is not None and data != "digits":
        raise LabError(f"--task {task} and --data {data} name two sources; leave one out")
    return task or data


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with an option for each setting that has one; it gets their values as the dict ``given``."""
    settings = {one.name: one for one in fields(Settings) if one.metadata.get("option")}

    @wraps(command)
    def wrapped(**options: Any) -> None:
        command(given={name: options.pop(name) for name in settings}, **options)

    kept = [one for one in signature(command).parameters.values() if one.name != "given"]
    for name, one in settings.items():
        kind: Any = one.type
        known = completed(_COMPLETED[name]) if name in _COMPLETED else None
        option = Annotated[kind | None, typer.Option(help=one.metadata["option"], autocompletion=known)]
        kept.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=option))
    wrapped.__signature__ = Signature(kept)  # type: ignore[attr-defined] # what Typer reads
    wrapped.__annotations__ = {one.name: one.annotation for one in kept}
    return wrapped
