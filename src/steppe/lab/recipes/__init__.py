"""The papers' tables and figures as Python functions that return runs, at three scales.

One file a study. They live in the package, not beside it, so that the installed `steppe recipes`, `steppe sweep` and
`steppe reproduce` find them; the records that documents cite are in `recipes/records` of the repository.
"""

from steppe.lab.recipes import (
    cost,
    decoupling,
    gamma_sensitivity,
    geometry,
    label_noise,
    m_sharpness,
    minima,
    rwsam_classification,
    rwsam_finetune,
    rwsam_label_noise,
    wsam_classification,
    wsam_finetune,
)
from steppe.lab.recipes.frame import SCALES, Recipe, Scale, Study
from steppe.lab.settings import LabError

__all__ = ["RECIPES", "SCALES", "Recipe", "Scale", "Study", "named"]

RECIPES: dict[str, Recipe] = {
    module.RECIPE.name: module.RECIPE
    for module in (
        wsam_classification,
        wsam_finetune,
        label_noise,
        geometry,
        decoupling,
        minima,
        gamma_sensitivity,
        m_sharpness,
        rwsam_classification,
        rwsam_finetune,
        rwsam_label_noise,
        cost,
    )
}


def named(name: str) -> Recipe:
    """Return the recipe of this name."""
    if name not in RECIPES:
        raise LabError(f"unknown recipe {name!r}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]
