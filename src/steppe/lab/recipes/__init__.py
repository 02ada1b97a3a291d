"""The papers' tables and figures as data: what each trains at two scales, and what is known of its protocol.

The records that the documents cite are in ``docs/records`` of the repository.
"""

from steppe.lab.errors import unknown
from steppe.lab.recipes import m_and_time, rwsam, wsam
from steppe.lab.recipes.recipe import SCALES, Recipe, Study

__all__ = ["RECIPES", "SCALES", "Recipe", "Study", "named"]

RECIPES = {
    recipe.name: recipe for recipe in (*wsam.RECIPES, m_and_time.M_SHARPNESS, *rwsam.RECIPES, m_and_time.EQUAL_TIME)
}


def named(name: str) -> Recipe:
    """Return the recipe of this name."""
    if name not in RECIPES:
        raise unknown(f"unknown recipe {name!r}", name, RECIPES)
    return RECIPES[name]
