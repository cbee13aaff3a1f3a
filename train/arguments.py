"""Command-line arguments that several commands read alike. A mistake is a `RecipeError`."""

from collections.abc import Sequence

from mnemic.train.errors import RecipeError
from mnemic.train.recipe.describe import closest


def one_of(option: str, name: str, allowed: Sequence[str]) -> str:
    if name not in allowed:
        hint = closest(name, allowed)
        raise RecipeError(f"{option}: {name!r} is not one of {', '.join(allowed)}{hint}")
    return name


def words(text: str) -> list[str]:
    """`a, b` as a list, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(option: str, text: str | None, least: int) -> list[int]:
    """`1,2,4` as a list; none where the option was not given."""
    if text is None:
        return []
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise RecipeError(f"{option}: {text!r} is not a list of numbers such as 1,2,4")
    return found
