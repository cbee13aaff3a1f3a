"""The cells of a grid: every combination of `--vary KEY=A,B,C`, times the seeds, each a recipe of
its own; all are checked before the first one trains.
"""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.preflight import check_data, check_environment
from mnemic.train.recipe.load import dump_recipe, load_recipe, parse_overrides
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")

_LONGEST = 80
"""Characters of a cell's name, which is a folder's name."""


@dataclass(frozen=True)
class Vary:
    """One `--vary`: a key, and its values as they were written."""

    key: str
    values: tuple[str, ...]


@dataclass
class Cell:
    """One run of the grid. `setting`: its varied overrides, without the seed. `refused`: why it
    cannot run; `recipe`: what it runs otherwise.
    """

    name: str
    setting: tuple[str, ...]
    seed: int | None
    folder: Path
    overrides: list[str]
    recipe: Recipe | None = None
    refused: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The file of what it printed."""
        return self.folder.with_name(self.folder.name + ".log")


def parse_vary(text: str) -> Vary:
    """`optimizer=adamw,apollo` or `tokens=none,{kind: protect, keep: 0.5}`: commas inside brackets
    and quotes belong to a value.
    """
    key, sep, values = text.partition("=")
    found = _split(values, text) if sep else []
    if not sep or not all(key.split(".")) or not all(found):
        raise RecipeError(f"--vary {text!r}: is written KEY=A,B,C, with no empty value")
    if key in ("name", "run_dir"):
        raise RecipeError(f"--vary {key}: each cell has its own already; --out chooses the folder")
    twice = [value for value in found if found.count(value) > 1]
    if twice:
        raise RecipeError(f"--vary {key}: the value {twice[0]} stands twice; leave one out")
    for value in found:
        parse_overrides([f"{key}={value}"])  # not YAML: said before anything else
    return Vary(key, tuple(found))


def _split(text: str, whole: str) -> list[str]:
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and text[start:i].rstrip()[-1:] in ("", "[", "{", ",", ":"):
            quote = c  # where a YAML value begins; elsewhere it is an apostrophe
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and not depth:
            parts.append(text[start:i])
            start = i + 1
        if depth < 0:
            break
    if depth or quote:
        raise RecipeError(f"--vary {whole!r}: a bracket or quote is not closed, or not opened")
    return [part.strip() for part in [*parts, text[start:]]]


def parse_grid(varied: Sequence[str], overrides: Sequence[str], seeds: int) -> list[Vary]:
    """All `--vary`, checked against each other and the overrides."""
    if seeds < 1:
        raise RecipeError("--seeds: must be 1 or more")
    found = [parse_vary(text) for text in varied]
    keys = [vary.key for vary in found]
    for key in keys:
        if keys.count(key) > 1:
            raise RecipeError(f"--vary {key}: stands twice; give its values in one")
    fixed = [".".join(path) for path, _ in parse_overrides(list(overrides))]
    for key in keys:
        if key in fixed:
            raise RecipeError(f"{key}: is varied and overridden; leave one of the two out")
    if seeds > 1 and "loop.seed" in keys:
        raise RecipeError("--seeds: loop.seed is varied already; leave one of the two out")
    return found


def make_cells(
    recipe: str, varied: Sequence[Vary], overrides: Sequence[str], seeds: int, out: Path
) -> list[Cell]:
    """Every cell with its recipe, or with the reason why it is refused; seeds of a setting stand
    together.
    """
    checked: dict[str, str] = {}
    cells: list[Cell] = []
    short = _short([vary.key for vary in varied])
    for values in itertools.product(*(vary.values for vary in varied)):
        setting = tuple(f"{v.key}={value}" for v, value in zip(varied, values, strict=True))
        words = [f"{short[v.key]}-{value}" for v, value in zip(varied, values, strict=True)]
        for turn in range(seeds):
            name = _name([*words, f"s{turn}"] if seeds > 1 else words, setting)
            if any(cell.name == name for cell in cells):
                name = f"{name}-{len(cells)}"
            cell = Cell(name, setting, None, out / name, [*overrides, *setting])
            cell.overrides += [f"name={name}", f"run_dir={json.dumps(str(cell.folder))}"]
            _check(cell, recipe, turn if seeds > 1 else None, checked)
            cells.append(cell)
    return cells


def _check(cell: Cell, recipe: str, turn: int | None, checked: dict[str, str]) -> None:
    """The cell's recipe and what it needs here; `checked` holds what was found of equal data."""
    try:
        cell.recipe, cell.notes = load_recipe(recipe, cell.overrides)
        if turn is not None:
            cell.seed = cell.recipe.loop.seed + turn
            cell.overrides.append(f"loop.seed={cell.seed}")
            cell.recipe, _ = load_recipe(recipe, cell.overrides)
        check_environment(cell.recipe)
        key = _data_key(cell.recipe)
        if key not in checked:
            checked[key] = ""
            try:
                check_data(cell.recipe)
            except UserError as error:
                checked[key] = str(error)
        cell.refused = checked[key]
    except UserError as error:
        cell.refused = str(error)
    cell.refused = "; ".join(cell.refused.splitlines())


def _data_key(recipe: Recipe) -> str:
    tree = dump_recipe(recipe)
    parts = ("data", "objective", "adapters", "memory")
    held = (tree["evaluation"] or {}).get("data")
    return json.dumps([*(tree[part] for part in parts), held], sort_keys=True)


def _short(keys: Sequence[str]) -> dict[str, str]:
    """`optimizer.lr` -> `lr`, where no other key ends so; `optimizer.kind` -> `optimizer`."""
    last = {key: key.removesuffix(".kind").split(".")[-1] for key in keys}
    return {k: v if list(last.values()).count(v) == 1 else k for k, v in last.items()}


def _name(words: Sequence[str], setting: Sequence[str]) -> str:
    """Fit for a folder and for a recipe's `name`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(words)).strip("-_.")
    if len(name) <= _LONGEST:
        return name
    mark = hashlib.sha256(repr(setting).encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - 12]}-{mark}{'_' + words[-1] if len(words) > len(setting) else ''}"


def manifest(
    recipe_tree: dict[str, Any], varied: Sequence[Vary], overrides: Sequence[str], seeds: int
) -> dict[str, Any]:
    """What makes a grid this one: equal for the same command over the same recipe."""
    grid = {
        "recipe": recipe_tree,
        "vary": {vary.key: list(vary.values) for vary in varied},
        "seeds": seeds,
        "overrides": list(overrides),
    }
    # As it reads back: YAML knows dates, JSON does not.
    return json.loads(json.dumps(grid, default=str))
