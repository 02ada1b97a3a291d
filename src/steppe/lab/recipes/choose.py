"""From what was typed to a recipe's studies, checked before anything runs."""

from dataclasses import replace
from pathlib import Path

from steppe.lab import models, tasks
from steppe.lab.recipes import SCALES, Recipe, Scale, Study, named
from steppe.lab.recipes.frame import check
from steppe.lab.settings import LabError


def scale_of(text: str) -> Scale:
    """Return the scale of this name."""
    for scale in SCALES:
        if scale == text:
            return scale
    raise LabError(f"unknown scale {text!r}; choose from {', '.join(SCALES)}")


def choose(name: str, scale: str, only: str | None, data_dir: Path | None) -> tuple[Recipe, list[Study]]:
    """Return the recipe and its studies, all or one, once methods and data have been found good."""
    recipe = named(name)
    studies = {study.name: study for study in recipe.studies(scale_of(scale))}
    if only is not None and only not in studies:
        raise LabError(f"{name} has no study {only!r} at scale {scale}; choose from {', '.join(studies)}")
    chosen = [_at(study, data_dir) for study in studies.values() if only in (None, study.name)]
    for study in chosen:
        check(study)
        tasks.check(study.settings)
        task = tasks.load(study.settings, seed=0)
        models.build(study.settings.model, task.inputs[0], task.classes)
    return recipe, chosen


def _at(study: Study, data_dir: Path | None) -> Study:
    if data_dir is None:
        return study
    return replace(study, settings=replace(study.settings, data_dir=str(data_dir.expanduser().resolve())))
