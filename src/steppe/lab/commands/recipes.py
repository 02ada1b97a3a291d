"""``steppe recipes``, ``reproduce`` and ``sweep``."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steppe.lab.commands import names
from steppe.lab.commands.names import completed
from steppe.lab.commands.options import DataDir, Storage, Workers
from steppe.lab.terminal import line

_RECIPE = completed(names.RECIPES)
Named = Annotated[str, typer.Argument(help="A recipe; `steppe recipes` lists them.", autocompletion=_RECIPE)]
AtScale = Annotated[str, typer.Option(help="paper or laptop.", autocompletion=completed(names.SCALES))]
Only = Annotated[str | None, typer.Option(help="One study of the recipe.", show_default="all")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds 0 to N-1.", show_default="the recipe's")]
Out = Annotated[Path | None, typer.Option(help="Directory.", show_default="runs/RECIPE-SCALE")]


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(help="A recipe to show whole.", show_default="all in brief", autocompletion=_RECIPE),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers' studies.

    With the name of one, show it with its protocol and what is known of it.

    Examples:

        steppe recipes
        steppe recipes label_noise
    """
    from steppe.lab.recipes import RECIPES, listing, named

    chosen = list(RECIPES.values()) if name is None else [named(name)]
    if as_json:
        typer.echo(json.dumps([asdict(recipe) for recipe in chosen], indent=1))
    elif name is None:
        listing.print_list(chosen, Console())
    else:
        listing.print_whole(chosen[0], Console())


def reproduce(
    name: Named,
    scale: AtScale = "laptop",
    study: Only = None,
    data_dir: DataDir = None,
    seeds: Seeds = None,
    storage: Storage = None,
    workers: Workers = None,
    out: Out = None,
) -> None:
    r"""Run a recipe: its search on a validation split, its comparison on the test set, a report for each study.

    The same command continues where it was stopped.

    Examples:

        steppe reproduce label_noise --study noise-0.4
        steppe reproduce wsam_classification --scale paper \
            --storage postgresql://lab@host/sweeps
    """
    from steppe.lab.commands.compare import compared
    from steppe.lab.commands.report import minima_measured
    from steppe.lab.recipes.reproduce import choose, planned

    console, processes = Console(), workers or os.cpu_count() or 1
    recipe, chosen = choose(name, scale, study, data_dir)
    for each in chosen:
        line(console, f"{recipe.name}, {each.name}")
        folder = (out or Path("runs") / f"{name}-{scale}") / each.name
        asked = replace(each, seeds=seeds or each.seeds)
        plan = planned(recipe, scale, asked, folder, storage, processes, lambda text: line(console, text))
        if code := compared(plan, folder, processes, console) or (
            recipe.measured and minima_measured(folder, console, data_dir)
        ):
            raise typer.Exit(int(code))


def sweep(
    name: Named,
    scale: AtScale = "laptop",
    study: Only = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="Other choices for a key that the recipe searches, rho=0.05,0.1,0.2; repeatable."),
    ] = None,
    seeds: Seeds = None,
    data_dir: DataDir = None,
    storage: Storage = None,
    workers: Workers = None,
    out: Out = None,
) -> None:
    """Run a recipe's grid search alone, stage by stage, on a validation split of the training examples.

    The same command continues an interrupted search; on several machines with one --storage it shares the points.

    Examples:

        steppe sweep wsam_classification
        steppe sweep label_noise --study noise-0.4 --space rho=0.1,0.2
    """
    from steppe.lab.errors import LabError
    from steppe.lab.recipes.reproduce import choose, searched
    from steppe.lab.runs import RECIPE, open_for
    from steppe.lab.sweep import space as spaces

    console, processes = Console(), workers or os.cpu_count() or 1
    recipe, chosen = choose(name, scale, study, data_dir)
    searching = [each for each in chosen if each.stages]
    if not searching:
        raise LabError(f"{recipe.name} searches nothing at scale {scale}")
    wanted, root = dict(map(spaces.parse, space or [])), out or Path("runs") / f"{name}-{scale}"
    narrowed = [
        replace(each, stages=spaces.narrowed(each.stages, wanted), search_seeds=seeds or each.search_seeds)
        for each in searching
    ]
    for asked in narrowed:
        spaces.check(asked.search())
        if (root / asked.name / RECIPE).exists():
            raise LabError(f"{root / asked.name} holds the search of a comparison; choose another --out")
    for asked in narrowed:
        line(console, f"{recipe.name}, {asked.name}")
        folder = root / asked.name
        study_name = f"{name}/{scale}/{asked.name}"
        values = searched(asked, study_name, folder, storage, processes, lambda text: line(console, text))
        open_for(folder, replace(asked.plan(values), seeds=0))
        line(console, f"Points: {folder / 'search.json'}; `steppe report {folder}` draws them")
