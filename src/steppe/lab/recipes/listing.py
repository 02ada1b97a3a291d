"""Recipes as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from steppe.lab.recipes.recipe import SCALES, Recipe, Study
from steppe.lab.terminal import line


def print_list(recipes: list[Recipe], console: Console) -> None:
    """Print one line for each recipe."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("recipe", "question", "source"):
        table.add_column(header, overflow="fold")
    for recipe in recipes:
        published = "; its numbers are shown beside ours" if any(study.published for study in recipe.paper) else ""
        table.add_row(recipe.name, recipe.question, recipe.source + published)
    console.print(table)
    line(console, "`steppe recipes NAME` shows the whole protocol, `steppe reproduce NAME` runs it.")


def print_whole(recipe: Recipe, console: Console) -> None:
    """Print a recipe's protocol and its studies at every scale."""
    facts = Table(f"{recipe.name}: {recipe.question}", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for topic, fact in (("source", recipe.source), *recipe.facts):
        facts.add_row(topic, fact)
    console.print(facts)
    for scale in SCALES:
        for study in recipe.studies(scale):
            console.print(f"{scale}: {study.name}", style="bold", markup=False, highlight=False)
            for text in _lines(study):
                console.print(f"  {text}", markup=False, highlight=False)


def _lines(study: Study) -> list[str]:
    """Return what a study trains, line by line."""
    s, points = study.settings, study.search_seeds * sum(len(stage.points()) for stage in study.stages)
    lines = [
        f"{s.data}, {s.train_size} examples{f', {100 * s.noise:g} % label noise' if s.noise else ''}; {s.model}; "
        f"{s.epochs} epochs, batch {s.batch_size}, lr {s.lr:g}, momentum {s.momentum:g}, "
        f"weight decay {s.weight_decay:g}{f'; starts from {s.start}' if s.start else ''}"
    ]
    for stage in study.stages:
        grid = (f"{key} in {', '.join(map(str, choices))}" for key, choices in stage.grid.items())
        lines.append(f"search {stage.name}, {stage.method}: {'; '.join(grid)}")
    lines += [f"compare {method}" for method in study.shown_methods()]
    searched = f", at most {points} to search" if points else ""
    lines.append(f"{len(study.methods) * study.seeds} runs over {study.seeds} seeds{searched}")
    return lines + [f"published for {text}: {error:g} % error" for text, error in study.published.items()]
