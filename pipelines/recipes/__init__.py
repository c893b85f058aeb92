"""Recipes: named whole configurations, one function a file, each returning a frozen `Pipeline`.

Reading a recipe imports neither torch nor ray.
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

from pipelines.recipes.amazon import amazon
from pipelines.recipes.demo import demo
from pipelines.recipes.movielens import movielens
from pipelines.recipes.napo_as_released import napo_as_released
from pipelines.recipes.sdpo import sdpo
from recray.config import Pipeline
from recray.errors import ConfigError


class Recipe(NamedTuple):
    """A configuration by name."""

    make: Callable[[], Pipeline]
    needs_data: bool  # without --data: False makes synthetic logs, True is refused

    @property
    def summary(self) -> str:
        """The first line of the recipe's docstring."""
        return (self.make.__doc__ or "").strip().partition("\n")[0]


RECIPES = {
    "demo": Recipe(demo, needs_data=False),
    "movielens": Recipe(movielens, needs_data=True),
    "amazon": Recipe(amazon, needs_data=True),
    "napo_as_released": Recipe(napo_as_released, needs_data=True),
    "sdpo": Recipe(sdpo, needs_data=True),
}


def find(name: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: naming the nearest recipe, if there is none of that name.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
    raise ConfigError(f"no recipe {name!r}; the nearest is {near!r} (there are: {', '.join(RECIPES)})")
