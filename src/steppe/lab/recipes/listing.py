"""Recipes as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from steppe.lab.recipes.recipe import SCALES, Recipe, Study


def print_list(recipes: list[Recipe], console: Console) -> None:
    """Print one line for each recipe."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("recipe", "question", "source"):
        table.add_column(header, overflow="fold")
    for recipe in recipes:
        published = "; its numbers are shown beside ours" if any(study.published for study in recipe.paper) else ""
        table.add_row(recipe.name, recipe.question, recipe.source + published)
    console.print(table)
    console.print("`steppe recipes NAME` shows the whole protocol, `steppe reproduce NAME` runs it.", highlight=False)


def print_whole(recipe: Recipe, console: Console) -> None:
    """Print a recipe's protocol and its studies at every scale."""
    console.print(f"{recipe.name}: {recipe.question}", markup=False, highlight=False)
    console.print(f"Source: {recipe.source}", markup=False, highlight=False)
    facts = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for topic, fact in recipe.facts:
        facts.add_row(topic, fact)
    console.print(facts)
    for scale in SCALES:
        for study in recipe.studies(scale):
            console.print(f"{scale}: {study.name}", style="bold", markup=False, highlight=False)
            for line in _lines(study):
                console.print(f"  {line}", markup=False, highlight=False)


def _lines(study: Study) -> list[str]:
    """Return what a study trains, line by line."""
    (searching, comparing), s = study.runs(), study.settings
    noise = f", {100 * s.noise:g} % label noise" if s.noise else ""
    start = f"; starts from {s.start}" if s.start else ""
    base = f"lr {s.lr:g}, momentum {s.momentum:g}, weight decay {s.weight_decay:g}"
    task = (
        f"{s.data}, {s.train_size} examples{noise}; {s.model}; {s.epochs} epochs, batch {s.batch_size}, {base}{start}"
    )
    grids = [
        f"search {stage.name}, {stage.method}: "
        + "; ".join(f"{key} in {', '.join(map(str, choices))}" for key, choices in stage.grid.items())
        for stage in study.stages
    ]
    runs = f"{comparing} runs over {study.seeds} seeds" + (f", at most {searching} to search" if searching else "")
    published = [f"published for {text}: {error:g} % error" for text, error in study.published.items()]
    return [task, *grids, *(f"compare {method}" for method in study.shown_methods()), runs, *published]
