"""In what the resolved recipes of runs differ."""

from collections.abc import Sequence
from typing import Any

from mnemic.train.folder import flat

# A run's name and place, of which no two runs have the same.
_OWN = ("name", "run_dir")
ABSENT = object()
"""A key that this run's recipe does not have, as that of another kind."""


def differing(recipes: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Key path -> its value in each recipe, for the keys whose values are not all alike."""
    trees = [flat(recipe) for recipe in recipes]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    found = {key: [tree.get(key, ABSENT) for tree in trees] for key in keys if key not in _OWN}
    return {key: values for key, values in found.items() if not _alike(values)}


def _alike(values: list[Any]) -> bool:
    # 1 and True are equal, and not the same setting.
    return all(v == values[0] and type(v) is type(values[0]) for v in values)
