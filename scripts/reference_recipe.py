"""docs/reference-recipe.md out of the recipe's types: a table for each section and kind."""

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mnemic.train.recipe.describe import kind_of, models_of
from mnemic.train.recipe.offload import parse_size
from mnemic.train.recipe.recipe import Recipe

HEAD = """\
# Recipe reference

Every section and key of a recipe, written by `python scripts/reference.py --write` from the types
that validate it. A section with kinds takes its keys beside `kind`; `optimizer: adamw` stands for
`optimizer: {kind: adamw}`. On the command line a key is written `section.key=value`. Sizes are
bytes, or such as `512MiB` and `2GiB`, in powers of 1024. What the sections mean together:
[recipe.md](recipe.md).
"""
_NAMES = {int: "integer", float: "number", str: "text", bool: "`true` or `false`"}
_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_UNITS = ("GiB", "MiB", "KiB")
Row = tuple[str, str, str, str]


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(text: str) -> str:
    """A docstring as one line of Markdown: no HTML outside of code spans."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else re.sub(r"<(?=[\w/])", "&lt;", p) for p in parts)


def cell(text: str) -> str:
    return text.replace("|", r"\|")


def parts_of(annotation: Any) -> list[type[BaseModel]]:
    """The parts that a key takes, or a list of them."""
    inside = get_args(annotation)[0] if get_origin(annotation) is list else annotation
    return models_of(inside)


class Pages:
    """Headings that are there already, by the part or parts below them."""

    def __init__(self) -> None:
        self.headings: dict[frozenset[type[BaseModel]], str] = {}
        self.tables: dict[type[BaseModel], str] = {}
        self.missing: list[str] = []

    def parent(self, model: type[BaseModel]) -> type[BaseModel] | None:
        """A part on the page whose keys it takes over."""
        return next((m for m in model.__mro__[1:] if m in self.tables), None)

    def link(self, models: list[type[BaseModel]]) -> str:
        heading = self.headings[frozenset(models)]
        return f"[{heading}](#{anchor(heading)})"

    def type_of(self, annotation: Any, metadata: tuple[Any, ...] = ()) -> str:
        """In words: what YAML may stand there."""
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            flat = [m for a in args[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])]
            return self.type_of(args[0], (*flat, *metadata))
        models = models_of(annotation)
        if models and origin in (None, Union, types.UnionType):
            known = self.link(models)
            return f"{known} or `null`" if type(None) in args else known
        if origin is Literal:
            return ", ".join(f"`{value}`" for value in args)
        if any(getattr(m, "func", None) is parse_size for m in metadata):
            return "size" + (" or `null`" if type(None) in args else "")
        if origin in (Union, types.UnionType):
            return " or ".join(self.type_of(arg, metadata) for arg in args)
        if annotation is type(None):
            return "`null`"
        if origin is list:
            some = " (one at least)" if any(isinstance(m, MinLen) for m in metadata) else ""
            return f"list of {self.type_of(args[0])}{some}"
        if origin is dict:
            return f"mapping of {self.type_of(args[0])} to {self.type_of(args[1])}"
        if origin is tuple:
            return f"[{', '.join(self.type_of(arg) for arg in args)}]"
        name = _NAMES[annotation]
        if annotation in (int, float):
            found = [_BOUNDS[type(m)] + (m,) for m in metadata if type(m) in _BOUNDS]
            bounds = [f"{sign} {getattr(m, attribute)}" for sign, attribute, m in found]
            name = " ".join([name, ", ".join(bounds)]) if bounds else name
        return name

    def rows(self, model: type[BaseModel]) -> list[Row]:
        """(key, type, default, what) of a part's fields, its tag aside."""
        found = []
        for name, field in model.model_fields.items():
            if name == "kind" and kind_of(model):
                continue
            if not field.description:
                self.missing.append(f"{model.__module__}.{model.__name__}.{name}")
            kind = self.type_of(field.annotation, tuple(field.metadata))
            found.append((name, kind, default(field, kind), prose(field.description or "")))
        return found


def default(field: FieldInfo, kind: str) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        given = value.model_dump(exclude_defaults=True)
        assert not given, given
        return f"`{kind_of(type(value))}`" if kind_of(type(value)) else "its defaults"
    if kind.startswith("size") and isinstance(value, int):
        power = next((3 - i for i in range(3) if value % (1 << 10 * (3 - i)) == 0), 0)
        return f"`{value >> 10 * power}{_UNITS[3 - power] if power else ''}`"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return f"`{text.strip().removesuffix('...').strip()}`" if value != "" else "empty"


def table(rows: list[Row]) -> str:
    lines = ["| key | type | default | what |", "|---|---|---|---|"]
    lines += [f"| `{key}` | " + " | ".join(map(cell, rest)) + " |" for key, *rest in rows]
    return "\n".join(lines)


class Section(NamedTuple):
    """`owner`: the kind whose key `path` is."""

    path: str
    what: str
    models: list[type[BaseModel]]
    owner: str | None


def sections(
    annotation: Any, path: str = "", what: str = "", owner: str | None = None
) -> Iterator[Section]:
    """A section, then those below its keys."""
    models = parts_of(annotation)
    yield Section(path, what, models, owner)
    for model in models:
        for name, field in model.model_fields.items():
            if parts_of(field.annotation):
                below = f"{path}.{name}" if path else name
                what = field.description or ""
                yield from sections(field.annotation, below, what, kind_of(model))


def page() -> str:
    """The whole page; ValueError where a field has no docstring."""
    pages, found = Pages(), []
    for section in sections(Recipe):
        key = frozenset(section.models)
        if key in pages.headings:
            continue  # such as evaluation.data: the data section again
        heading = section.path or "The sections"
        if heading in pages.headings.values():  # data.stream of another kind of data
            heading = f"{heading} ({section.owner})"
        pages.headings[key] = heading
        found.append((heading, section))
    parts = [HEAD]
    for heading, section in found:
        level = "###" if "." in heading else "##"
        parts.append(f"{level} {heading}\n")
        if len(section.models) > 1:
            parts.append(prose(section.what) + "\n")
        parts += kinds(pages, heading, section.models, level + "#")
    if pages.missing:
        raise ValueError(f"recipe fields without a docstring: {', '.join(pages.missing)}")
    return "\n".join(parts)


def kinds(pages: Pages, heading: str, models: list[type[BaseModel]], level: str) -> Iterator[str]:
    """Each kind of a section with its table, less what all kinds share, or a parent has alike."""
    rows = {model: pages.rows(model) for model in models}
    for model in models:
        tag = kind_of(model)
        pages.tables[model] = f"{heading}: {tag}" if tag else heading
    own = [m for m in models if rows[m] and not pages.parent(m)]
    shared = [row for row in rows[own[0]] if all(row in rows[m] for m in own)] if own else []
    if len(own) > 1 and shared:
        some = "Every kind" if len(own) == len(models) else "Every kind with keys"
        yield f"{some} has\n\n{table(shared)}\n"
    for model in models:
        if kind_of(model):
            yield f"{level} {pages.tables[model]}\n"
        if model is not Recipe:
            yield prose(model.__doc__ or "") + "\n"
        left = rows[model]
        if parent := pages.parent(model):
            left = [row for row in left if row not in pages.rows(parent)]
            name = pages.tables[parent]
            yield f"As [{name}](#{anchor(name)})" + (", and\n" if left else ".\n")
        elif len(own) > 1:
            left = [row for row in left if row not in shared]
        if left:
            yield table(left) + "\n"
