"""Looks into the recipe's types: the arms of a tagged part, the keys of a section, pydantic errors
as sentences.
"""

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mnemic.train.recipe.recipe import Recipe


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """The recipe parts an annotation admits, through Annotated, unions and None."""
    if get_origin(annotation) is Annotated:
        return models_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in models_of(arg)]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return []


def kind_of(model: type[BaseModel]) -> str | None:
    """The tag of a part; a section such as `loop` or a `schedule` with several kinds has none."""
    field = model.model_fields.get("kind")
    values = get_args(field.annotation) if field else ()
    return values[0] if len(values) == 1 else None


def models_at(path: Sequence[Any]) -> list[type[BaseModel]]:
    """The parts that may stand at a key path such as `["evaluation", "data"]`; empty where none
    does.
    """
    found: list[type[BaseModel]] = [Recipe]
    for key in path:
        fields = [m.model_fields[key] for m in found if key in m.model_fields]
        found = [m for field in fields for m in models_of(field.annotation)]
    return list(dict.fromkeys(found))


def arms(path: Sequence[str]) -> dict[str, set[str]] | None:
    """Kind -> field names for a tagged part, None where the path is not one."""
    tagged = {kind: m for m in models_at(path) if (kind := kind_of(m))}
    return {kind: set(m.model_fields) for kind, m in tagged.items()} or None


def closest(word: str, allowed: Sequence[str]) -> str:
    """`; did you mean 'rank'?`, or nothing."""
    match = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def explain(error: ValidationError) -> list[str]:
    """One line for each mistake: key path, what is wrong, what is allowed."""
    lines: list[str] = []
    for item in error.errors(include_url=False):
        path, models = _walk(item["loc"])
        for line in _sentence(item, path, models):
            if line not in lines:
                lines.append(line)
    return lines


def _walk(loc: tuple[Any, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """A pydantic location without the union tags it inserts, and the models of the enclosing
    section.
    """
    path: list[str] = []
    models: list[type[BaseModel]] = [Recipe]
    for key in loc:
        tags = {kind_of(m): m for m in models}
        if len(models) > 1 and key in tags:
            models = [tags[key]]
            continue
        path.append(str(key))
        below = [models_of(m.model_fields[key].annotation) for m in models if key in m.model_fields]
        if any(below):
            models = list(dict.fromkeys(m for group in below for m in group))
    return path, models


def _sentence(item: Any, path: list[str], models: list[type[BaseModel]]) -> list[str]:
    key, kind, value = ".".join(path), item["type"], item["input"]
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = [name for m in models for name in m.model_fields]
        hint = closest(path[-1], allowed)
        return [f"{key}: unknown key{hint or '; allowed are ' + ', '.join(sorted(allowed))}"]
    if kind == "missing":
        return [f"{key}: missing; it has no default"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [tag for m in models if (tag := kind_of(m))]
        if kind == "union_tag_not_found":
            return [f"{key}.kind: missing; allowed are {', '.join(tags)}"]
        tag = str(context.get("tag"))
        return [f"{key}.kind: {tag!r} is not one of {', '.join(tags)}{closest(tag, tags)}"]
    if kind == "literal_error":
        allowed = [m.strip(" '") for m in str(context["expected"]).replace(" or ", ",").split(",")]
        return [f"{key}: {value!r} is not one of {', '.join(allowed)}{closest(value, allowed)}"]
    if kind == "value_error":
        prefix = f"{key}: " if key else ""
        return [prefix + line for line in str(context["error"]).splitlines()]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{key}: {value!r} is not a section of keys"]
    message = item["msg"].removeprefix("Input ").removeprefix("Value ")
    return [f"{key}: {value!r} {message}"]
