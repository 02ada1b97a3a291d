"""From a recipe's name to the comparison to run: check, search, time; the same call continues."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from steppe.lab import files, models, tasks
from steppe.lab.errors import LabError, unknown
from steppe.lab.price import prices
from steppe.lab.recipes import Recipe, Study, named
from steppe.lab.runs import RECIPE, SEARCH, Plan
from steppe.lab.settings import Settings
from steppe.lab.spec import Method
from steppe.lab.sweep.space import Value, applied, filled
from steppe.lab.sweep.work import Worksite, search


def choose(name: str, scale: str, only: str | None, data_dir: Path | None) -> tuple[Recipe, list[Study]]:
    """Return the recipe and its studies, all or one, after checking their methods, data and models."""
    recipe = named(name)
    studies = {study.name: study for study in recipe.studies(scale)}
    if only is not None and only not in studies:
        raise unknown(f"{name} has no study {only!r} at scale {scale}", only, studies)
    chosen = [study for study in studies.values() if only in (None, study.name)]
    if data_dir is not None:
        folder = str(data_dir.expanduser().resolve())
        chosen = [replace(study, settings=replace(study.settings, data_dir=folder)) for study in chosen]
    for study in chosen:
        study.check()
        task = tasks.load(study.settings, seed=0)
        models.build(study.settings.model, task.inputs[0], task.classes)
    return recipe, chosen


def searched(
    study: Study, name: str, out: Path, storage: str | None, workers: int, tell: Callable[[str], None]
) -> dict[str, Value]:
    """Run a study's search, write its points to ``OUT/search.json`` and return all values of the study."""
    asked, kept = study.search(), out / SEARCH
    digests = [asked.digest(stage, {}) for stage in asked.stages]
    if kept.exists() and files.read_json(kept).get("digests", digests) != digests:
        raise LabError(f"{out} holds another search; choose another --out")
    url = storage or f"sqlite:///{(out / 'study.db').resolve()}"
    values, stages = search(asked, Worksite(url, name, out / "search"), workers, lambda text, done: tell(text))
    files.write_json(kept, {"stages": stages, "seeds": study.search_seeds, "digests": digests})
    return values


def planned(
    recipe: Recipe,
    scale: str,
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
    about = {"recipe": recipe.name, "scale": scale, "study": study.name, "values": values}
    about |= {key: getattr(recipe, key) for key in ("question", "source", "facts", "setting")}
    published = {str(filled(text, values)): study.published.get(text) for text in study.methods}
    files.write_json(kept, about | {"published": published if study.published else {}})
    return study.plan(values)


def multiples(settings: Settings, methods: Mapping[str, Method]) -> dict[str, str]:
    """Return by method the epochs that take as long as twice the common number of SGD, as a multiple of that number.

    The first method is SGD itself.
    """
    seconds = {hole: each.seconds for hole, each in prices(settings, methods).items()}
    budget = 2 * next(iter(seconds.values()))
    return {hole: f"{max(budget / each, 0.01):.2f}x" for hole, each in seconds.items()}
