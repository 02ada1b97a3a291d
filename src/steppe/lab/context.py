"""What lies beside a comparison's runs: the recipe it belongs to and the search before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steppe.lab import record
from steppe.lab.settings import LabError

RECIPE, SEARCH = "recipe.json", "search.json"


@dataclass(frozen=True)
class Context:
    """Plain data, empty where there is none; `steppe.lab.recipes.reproduce` writes it."""

    recipe: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def published(self) -> Mapping[str, float | None]:
        """Return the paper's test error in per cent by method, None where it is not known."""
        numbers: Mapping[str, float | None] = self.recipe.get("published", {})
        return numbers


def read(folder: Path) -> Context:
    """Return a directory's context."""
    return Context(_read(folder / RECIPE), _read(folder / SEARCH))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return record.read_json(path)
    except ValueError as error:
        raise LabError(f"{path} is damaged: {error}") from error
