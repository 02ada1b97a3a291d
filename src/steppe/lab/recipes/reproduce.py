"""From a recipe's name to the comparison to run: check, search, time; the same call continues."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from steppe.lab import files, models, tasks
from steppe.lab.errors import LabError
from steppe.lab.recipes import SCALES, Recipe, Scale, Study, named
from steppe.lab.recipes.step_times import multiples
from steppe.lab.runs import RECIPE, SEARCH, Plan
from steppe.lab.sweep.space import Value, applied, filled
from steppe.lab.sweep.work import search


def scale_of(text: str) -> Scale:
    """Return the scale of this name."""
    for scale in SCALES:
        if scale == text:
            return scale
    raise LabError(f"unknown scale {text!r}; choose from {', '.join(SCALES)}")


def choose(name: str, scale: str, only: str | None, data_dir: Path | None) -> tuple[Recipe, list[Study]]:
    """Return the recipe and its studies, all or one, after checking their methods, data and models."""
    recipe = named(name)
    studies = {study.name: study for study in recipe.studies(scale_of(scale))}
    if only is not None and only not in studies:
        raise LabError(f"{name} has no study {only!r} at scale {scale}; choose from {', '.join(studies)}")
    chosen = [_with_data(study, data_dir) for study in studies.values() if only in (None, study.name)]
    for study in chosen:
        study.check()
        tasks.check(study.settings)
        task = tasks.load(study.settings, seed=0)
        models.build(study.settings.model, task.inputs[0], task.classes)
    return recipe, chosen


def _with_data(study: Study, data_dir: Path | None) -> Study:
    if data_dir is None:
        return study
    return replace(study, settings=replace(study.settings, data_dir=str(data_dir.expanduser().resolve())))


def searched(
    study: Study, name: str, out: Path, storage: str | None, workers: int, tell: Callable[[str], None]
) -> dict[str, Value]:
    """Run a study's search, write its points to ``OUT/search.json`` and return all values of the study."""
    url = storage or f"sqlite:///{(out / 'study.db').resolve()}"
    values, ended = search(study.search(), url, name, workers, tell=tell)
    stages = [
        {"name": each.stage.name, "method": each.stage.method, "chosen": dict(each.chosen), "points": each.points}
        for each in ended
    ]
    files.write_json(out / SEARCH, {"stages": stages, "seeds": study.search_seeds})
    return values


def planned(
    recipe: Recipe,
    scale: Scale,
    study: Study,
    out: Path,
    storage: str | None = None,
    workers: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return the comparison to run; values that the study leaves open are found and kept in ``OUT/recipe.json``."""
    kept = out / RECIPE
    if kept.exists():
        try:
            return study.plan(dict(files.read_json(kept)["values"]))
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"{kept} is damaged ({error}); delete it to search again") from error
    values = dict(study.values)
    if study.stages:
        values = searched(study, f"{recipe.name}/{scale}/{study.name}", out, storage, workers, tell)
    if study.timed:
        tell("timing steps")
        methods = {hole: filled(text, values) for hole, text in study.timed.items()}
        values |= multiples(applied(study.settings, values), methods)
    files.write_json(kept, _about(recipe, scale, study, values))
    return study.plan(values)


def _about(recipe: Recipe, scale: Scale, study: Study, values: dict[str, Value]) -> dict[str, Any]:
    """Return what a report says of the recipe beside the runs."""
    published = {str(filled(text, values)): study.published.get(text) for text in study.methods}
    return {
        "recipe": recipe.name,
        "question": recipe.question,
        "source": recipe.source,
        "facts": recipe.facts,
        "scale": scale,
        "study": study.name,
        "values": values,
        "setting": recipe.setting,
        "published": published if study.published else {},
    }
