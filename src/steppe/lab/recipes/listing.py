"""Recipes as tables in a terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from steppe.lab.recipes.recipe import SCALES, Recipe, Study
from steppe.lab.terminal import line


def print_list(recipes: list[Recipe], console: Console) -> None:
    """Print one line for each recipe."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("question", overflow="fold")
    table.add_column("source", overflow="fold")
    for recipe in recipes:
        published = "; its numbers are shown beside ours" if any(study.published for study in recipe.paper) else ""
        table.add_row(recipe.name, recipe.question, recipe.source + published)
    console.print(table)
    line(console, "`steppe recipes NAME` shows the whole protocol, `steppe reproduce NAME` runs it.")


def print_whole(recipe: Recipe, console: Console) -> None:
    """Print a recipe's protocol and its studies at every scale."""
    facts = Table(recipe.name, recipe.question, box=box.SIMPLE_HEAD, pad_edge=False)
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
    s = study.settings
    noise = f", {100 * s.noise:g} % label noise" if s.noise else ""
    start = f"; starts from {s.start}" if s.start else ""
    base = f"lr {s.lr:g}, momentum {s.momentum:g}, weight decay {s.weight_decay:g}"
    task = f"{s.data}, {s.train_size} examples{noise}; {s.model}; {s.epochs} epochs, batch {s.batch_size}"
    lines = [f"{task}, {base}{start}"]
    for stage in study.stages:
        grid = "; ".join(f"{key} in {', '.join(map(str, choices))}" for key, choices in stage.grid.items())
        points = len(stage.points()) * study.search_seeds
        lines.append(f"search {stage.name}, {stage.method}: {grid}: at most {points} runs")
    given = [f"{key} {value}" for key, value in study.values.items()]
    lines += [f"given {', '.join(given)}"] if given else []
    lines += [f"compare {method}" for method in study.methods]
    lines.append(f"{len(study.methods) * study.seeds} runs over {study.seeds} seeds")
    return lines + [f"published for {text}: {error:g} % error" for text, error in study.published.items()]
