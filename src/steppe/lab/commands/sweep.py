"""``steppe sweep``."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steppe.lab.commands.recipes import AtScale, DataDir, Named, Only, Out, Storage, Workers
from steppe.lab.errors import LabError
from steppe.lab.terminal import line

Space = Annotated[
    list[str] | None,
    typer.Option(help="Other choices for a key that the recipe searches, rho=0.05,0.1,0.2; repeatable."),
]
SearchSeeds = Annotated[
    int | None, typer.Option(min=1, help="Seeds of every point, 0 to N-1.", show_default="the recipe's")
]


def sweep(
    name: Named,
    scale: AtScale = "laptop",
    study: Only = None,
    space: Space = None,
    seeds: SearchSeeds = None,
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
        asked = replace(each, stages=spaces.narrowed(each.stages, wanted), search_seeds=seeds or each.search_seeds)
        spaces.check(asked.search())
        folder = (out or Path("runs") / f"{name}-{scale}") / each.name
        if (folder / RECIPE).exists():
            raise LabError(f"{folder} holds the search that its comparison was made from; choose another --out")
        line(console, f"{name}, {each.name}")
        study_name = f"{name}/{scale}/{each.name}"
        values = searched(asked, study_name, folder, storage, processes, lambda text: line(console, text))
        open_for(folder, replace(asked.plan(values), seeds=0))
        line(console, f"Points: {folder / 'search.json'}; `steppe report {folder}` draws them")
