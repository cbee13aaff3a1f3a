"""What `mnemic plan` says of a run's recipe, for the page to hold beside what was measured.

Only where the model lies on this machine: a page never downloads. The ways that the recipe did not
choose, and the disk's speed, are left to `mnemic plan`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError
from mnemic.train.recipe.load import build_recipe, dump_recipe
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.report.read import Run


@dataclass
class Planned:
    """Bytes by part, of the host and of the device; `note`: why there are none, or where they are
    from.
    """

    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    peak: str = ""
    note: str = ""


def plans(runs: Sequence[Run]) -> list[Planned]:
    """One for each run; recipes that only differ in what takes no memory are planned once."""
    known: dict[str, Planned] = {}
    base: int | None = None
    found = []
    for run in runs:
        try:
            recipe = build_recipe(run.recipe)
        except UserError as error:
            why = str(error).splitlines()[0]
            found.append(Planned(note=f"not planned: this version refuses the recipe: {why}"))
            continue
        if absent := _absent(recipe):
            found.append(_not_here(absent, f"{run.path}/recipe.yaml"))
            continue
        key = json.dumps(takes_memory(dump_recipe(recipe)), sort_keys=True)
        if key not in known:
            base = base or _base(recipe)
            known[key] = _plan(recipe, base)
        found.append(known[key])
    return found


def plan_of(recipe: Recipe) -> Planned:
    """That of one recipe, in a process that has built nothing yet."""
    if absent := _absent(recipe):
        return _not_here(absent, "RECIPE")
    return _plan(recipe, _base(recipe))


def _not_here(model: str, recipe: str) -> Planned:
    return Planned(
        note=f"not planned: {model} is not a folder of this machine; mnemic plan {recipe} "
        "fetches it"
    )


def _base(recipe: Recipe) -> int:
    from mnemic.train.plan.machine import imports_bytes, run_device

    # Before the first plan: later this process holds more than a run's would.
    return imports_bytes(recipe, run_device(recipe))


def _plan(recipe: Recipe, base: int) -> Planned:
    from mnemic.train.plan.machine import run_device
    from mnemic.train.plan.plan import known_tokenizer
    from mnemic.train.plan.shapes import shapes_of
    from mnemic.train.plan.ways import Planner, Way

    notes: list[str] = []
    device = run_device(recipe)
    way = Way(recipe.update.kind, [])
    try:
        tokenizer, known = known_tokenizer(recipe, notes)
        shapes = shapes_of(recipe, tokenizer if known else None)
        planner = Planner(recipe, tokenizer, device, base)
        planner.fill(way, recipe, shapes)
    except UserError as error:
        return Planned(note=f"not planned: {str(error).splitlines()[0]}")
    notes += [shapes.note, *shapes.missing, *planner.notes]
    if recipe.tokens.kind != "none":
        notes.append(f"tokens.kind={recipe.tokens.kind} is not counted: layers run on all tokens")
    host = {part: size for part, size in way.host.items() if size}
    return Planned(host, dict(way.device), way.peak, "; ".join(notes))


def _absent(recipe: Recipe) -> str | None:
    """The first model of the recipe that would have to be fetched."""
    from mnemic.models.smollm2 import NAME, cache_root, is_complete

    parts: list[Any] = [recipe.model, getattr(recipe.objective, "teacher", None)]
    for part in parts:
        path = getattr(part, "path", None)
        if path is not None and not Path(path).expanduser().is_dir():
            return str(path)
        if getattr(part, "kind", None) == NAME and not is_complete(cache_root() / NAME):
            return NAME
    return None


def takes_memory(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe's tree that its plan depends on."""
    found = {k: v for k, v in recipe.items() if k not in ("name", "run_dir", "track")}
    found["loop"] = {k: v for k, v in recipe["loop"].items() if k not in ("seed", "steps")}
    found["optimizer"] = {k: v for k, v in recipe["optimizer"].items() if k != "lr"}
    return found
