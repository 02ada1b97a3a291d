"""Recipes as tables for people and as plain data for programs."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from steppe.lab.recipes.frame import SCALES, Recipe, Study, names


def brief(recipes: list[Recipe], console: Console) -> None:
    """Print a line for each recipe."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("recipe", "question", "source", "its numbers"):
        table.add_column(header, overflow="fold")
    for recipe in recipes:
        known = any(study.published for study in recipe.studies("paper"))
        table.add_row(recipe.name, recipe.question, recipe.source, "known" if known else "not known")
    console.print(table)
    console.print("`steppe recipes NAME` shows a protocol whole, `steppe reproduce NAME` runs it.", highlight=False)


def whole(recipe: Recipe, console: Console) -> None:
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
            for line in lines(study):
                console.print(f"  {line}", markup=False, highlight=False)


def lines(study: Study) -> list[str]:
    """Say what a study trains."""
    (searching, comparing), s = study.runs(), study.settings
    noise = f", {100 * s.noise:g} % label noise" if s.noise else ""
    start = f"; starts from {s.start}" if s.start else ""
    base = f"lr {s.lr:g}, momentum {s.momentum:g}, weight decay {s.weight_decay:g}"
    told = [
        f"{s.data}, {s.train_size} examples{noise}; {s.model}; {s.epochs} epochs, batch {s.batch_size}, {base}{start}"
    ]
    for stage in study.stages:
        grids = "; ".join(f"{key} in {', '.join(map(str, choices))}" for key, choices in stage.grid.items())
        told.append(f"search {stage.name}, {stage.method}: {grids}")
    told += [f"compare {method}" for method in names(study)]
    told.append(
        f"{comparing} runs over {study.seeds} seeds" + (f", at most {searching} to search" if searching else "")
    )
    for text, error in study.published.items():
        told.append(f"published for {text}: {error:g} % error")
    return told


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as data for JSON."""
    scales = {scale: [_study(study) for study in recipe.studies(scale)] for scale in SCALES}
    facts = [{"topic": topic, "fact": fact} for topic, fact in recipe.facts]
    return {"recipe": recipe.name, "question": recipe.question, "source": recipe.source, "facts": facts} | scales


def _study(study: Study) -> dict[str, Any]:
    stages = [{"name": stage.name, "method": stage.method, "grid": dict(stage.grid)} for stage in study.stages]
    data = {"name": study.name, "settings": study.settings.to_dict(), "methods": names(study), "seeds": study.seeds}
    return data | {"search": stages, "published": dict(study.published)}
