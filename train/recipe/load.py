"""From a recipe file and `a.b=c` overrides to a `Recipe`, or to one sentence for each mistake."""

import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mnemic.train.errors import RecipeError
from mnemic.train.recipe.describe import arms, explain, models_at
from mnemic.train.recipe.recipe import Recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> path of the recipes inside the package."""
    folder = Path(str(resources.files("mnemic.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A path, or the name of a shipped recipe."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise RecipeError(f"{name}: is a folder, not a recipe file")
    raise RecipeError(
        f"{name}: no such file, and no shipped recipe of that name; "
        f"shipped are {', '.join(shipped) or 'none'} (mnemic recipes ls)"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a duplicate key, another type or broken YAML is a
    `RecipeError`.
    """
    try:
        tree = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text ({error.reason})", source=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}not valid YAML: {problem}", source=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", source=str(path)) from None
    if not isinstance(tree, dict):
        what = "empty" if tree is None else f"a {type(tree).__name__}, not a mapping of keys"
        raise RecipeError(f"the recipe is {what}", source=str(path))
    return tree


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader, except that the same key twice is an error instead of the last one winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_overrides(items: list[str]) -> list[tuple[list[str], Any]]:
    """`["a.b=1"]` -> `[(["a", "b"], 1)]`; values are YAML."""
    parsed = []
    for item in items:
        key, sep, text = item.partition("=")
        if not sep or not all(key.split(".")):
            raise RecipeError(f"{item!r}: overrides are written key.subkey=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise RecipeError(f"{key}: the value {text!r} is not valid YAML; quote it") from None
        parsed.append((key.split("."), value))
    return parsed


def apply_overrides(tree: dict[str, Any], overrides: list[tuple[list[str], Any]]) -> list[str]:
    """Set each override in `tree` (last wins); returns a note for each key a `kind` switch dropped.

    Switches are applied first, so `optimizer.kind=sgd optimizer.momentum=0.9` works in either
    order.
    """
    notes: list[str] = []

    def is_switch(path: list[str], value: Any) -> bool:
        return path[-1] == "kind" or (isinstance(value, str) and arms(path) is not None)

    switches = [o for o in overrides if is_switch(*o)]
    for path, value in switches:
        section = path[:-1] if path[-1] == "kind" else path
        node = _section(tree, section)
        fields = (arms(section) or {}).get(value)
        if fields is not None and node.get("kind") != value:
            gone = [key for key in node if key != "kind" and key not in fields]
            for key in gone:
                del node[key]
            if gone:
                key = ".".join(section)
                notes.append(
                    f"{key}.kind={value}: {', '.join(f'{key}.{k}' for k in gone)} of the recipe "
                    f"no longer appl{'ies' if len(gone) == 1 else 'y'} and "
                    f"{'was' if len(gone) == 1 else 'were'} dropped"
                )
        node["kind"] = value
    for path, value in overrides:
        if not is_switch(path, value):
            _section(tree, path[:-1])[path[-1]] = value
    return notes


def _section(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    node: Any = tree
    for depth, key in enumerate(path):
        child = node.get(key)
        if child is None:
            child = node[key] = {}
        elif isinstance(child, str) and models_at(path[: depth + 1]):
            child = node[key] = {"kind": child}
        elif not isinstance(child, dict):
            at = ".".join(path[: depth + 1])
            raise RecipeError(f"{at}: holds the value {child!r}, so it has no keys below it")
        node = child
    return node


def build_recipe(tree: dict[str, Any], *, source: str = "") -> Recipe:
    """Validate a plain tree; every mistake becomes one line of the raised `RecipeError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error), source=source) from None


def load_recipe(name: str, overrides: list[str]) -> tuple[Recipe, list[str]]:
    """The validated recipe, and notes on what the overrides dropped."""
    path = find_recipe(name)
    tree = read_yaml(path)
    notes = apply_overrides(tree, parse_overrides(overrides))
    return build_recipe(tree, source=path.name), notes


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """Plain tree of all values, defaults included: the run folder's recipe and the tracker's
    config.
    """
    return recipe.model_dump(mode="json")


def to_yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
