"""Run a recipe's study: search, time, compare; everything is kept, and the same call continues."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steppe.lab import files
from steppe.lab.recipes.frame import Recipe, Scale, Study
from steppe.lab.recipes.timing import multiples
from steppe.lab.runs import RECIPE, SEARCH, Plan
from steppe.lab.settings import LabError
from steppe.lab.sweep.space import Value, applied, filled
from steppe.lab.sweep.work import Ended, search


def searched(
    study: Study, name: str, out: Path, storage: str | None, workers: int, tell: Callable[[str], None]
) -> dict[str, Value]:
    """Search what the study searches, write the points to `OUT/search.json` and return all its values."""
    url = storage or f"sqlite:///{(out / 'study.db').resolve()}"
    values, stages = search(study.search(), url, name, workers, tell=tell)
    files.write_json(out / SEARCH, {"stages": [_plain(stage) for stage in stages], "seeds": study.search_seeds})
    return values


def _plain(ended: Ended) -> dict[str, Any]:
    stage = ended.stage
    return {"name": stage.name, "method": stage.method, "chosen": dict(ended.chosen), "points": ended.points}


def planned(
    recipe: Recipe,
    scale: Scale,
    study: Study,
    out: Path,
    storage: str | None = None,
    workers: int = 1,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Find the values that the study leaves open, keep them in `OUT/recipe.json`, and return the comparison to run."""
    kept = out / RECIPE
    if kept.exists():
        try:
            values = dict(files.read_json(kept)["values"])
        except (ValueError, KeyError, TypeError) as error:
            raise LabError(f"{kept} is damaged ({error}); delete it to search again") from error
        return study.plan(values)
    values = dict(study.values)
    if study.stages:
        values = searched(study, f"{recipe.name}/{scale}/{study.name}", out, storage, workers, tell)
    if study.timed:
        tell("timing steps")
        methods = {hole: filled(text, values) for hole, text in study.timed.items()}
        values |= multiples(applied(study.settings, values), methods)
    files.write_json(kept, about(recipe, scale, study, values))
    return study.plan(values)


def about(recipe: Recipe, scale: Scale, study: Study, values: Mapping[str, Value]) -> dict[str, Any]:
    """Return what a report says of the recipe beside the runs."""
    facts = {"recipe": recipe.name, "question": recipe.question, "source": recipe.source, "facts": recipe.facts}
    here = {"scale": scale, "study": study.name, "values": dict(values), "setting": recipe.setting}
    return facts | here | {"published": study.paper(values)}
