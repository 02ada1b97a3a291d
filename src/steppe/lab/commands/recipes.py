"""``steppe recipes``, ``reproduce`` and ``sweep``."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steppe.lab.commands.options import Storage, Workers
from steppe.lab.terminal import line

Named = Annotated[str, typer.Argument(help="A recipe; `steppe recipes` lists them.")]
AtScale = Annotated[str, typer.Option(help="paper or laptop.")]
Only = Annotated[str | None, typer.Option(help="One study of the recipe.", show_default="all")]
DataDir = Annotated[Path | None, typer.Option(help="Folder that holds the data.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds 0 to N-1.", show_default="the recipe's")]
Out = Annotated[Path | None, typer.Option(help="Directory.", show_default="runs/RECIPE-SCALE")]


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe to show whole.", show_default="all in brief")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the papers' studies, or show one with its protocol and what is known of it.

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
    """Run a recipe: its search on a validation split, its comparison on the test set, a report for each study.

    The same command continues where it was stopped.

    Examples:

        steppe reproduce label_noise --study noise-0.4

        steppe reproduce wsam_classification --scale paper --data-dir ~/data --storage postgresql://lab@host/sweeps
    """
    from steppe.lab.commands.compare import compared, minima_measured
    from steppe.lab.recipes.reproduce import choose, planned

    console, processes = Console(), workers or os.cpu_count() or 1
    recipe, chosen = choose(name, scale, study, data_dir)
    for each in chosen:
        line(console, f"{recipe.name}, {each.name}")
        folder = (out or Path("runs") / f"{name}-{scale}") / each.name
        asked = replace(each, seeds=seeds or each.seeds)
        plan = planned(recipe, scale, asked, folder, storage, processes, lambda text: line(console, text))
        if code := compared(folder, plan, processes, console) or (recipe.measured and minima_measured(folder, console)):
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

        steppe sweep label_noise --study noise-0.4 --space rho=0.1,0.2,0.3 --seeds 3
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
    wanted = dict(map(spaces.parse, space or []))
    for each in searching:
        line(console, f"{recipe.name}, {each.name}")
        folder = (out or Path("runs") / f"{name}-{scale}") / each.name
        if (folder / RECIPE).exists():
            raise LabError(f"{folder} holds the search that its comparison was made from; choose another --out")
        asked = replace(each, stages=spaces.narrowed(each.stages, wanted), search_seeds=seeds or each.search_seeds)
        spaces.check(asked.search())
        study_name = f"{name}/{scale}/{each.name}"
        values = searched(asked, study_name, folder, storage, processes, lambda text: line(console, text))
        open_for(folder, replace(asked.plan(values), seeds=0))
        line(console, f"Points: {folder / 'search.json'}; `steppe report {folder}` draws them")
