"""Activations of a recipe's model under each combination of techniques, and the cheapest that fits.

A combination is a few overrides of the recipe (`techniques.py`), built as any recipe is. Exact ones
come first; those that drop tokens are looked at only where no exact one fits.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.plan.activations import Activations, count_activations
from mnemic.train.plan.fits import neighbour
from mnemic.train.plan.live import fake
from mnemic.train.plan.machine import run_device, this_machine
from mnemic.train.plan.plan import known_tokenizer
from mnemic.train.plan.shapes import Shape, shapes_of
from mnemic.train.plan.sizes import (
    describe,
    empty_model,
    gradient_bytes,
    quiet,
    state_bytes,
    trained,
    weight_bytes,
)
from mnemic.train.plan.techniques import (
    EXACT,
    SPARSE,
    all_supervised,
    changed,
    has,
    kept_tokens,
    techniques,
)
from mnemic.train.recipe.load import dump_recipe
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.tokens import NoTokens
from mnemic.train.recipe.training import InBackwardUpdate, StreamedUpdate


@dataclass
class Combination:
    """`overrides`, `counted`: by tokens of a row. `state`: bytes of weights and optimizer state.
    `gradients`: of all of them at once. `freed`: each gradient goes inside the backward.
    """

    name: str
    exact: bool
    overrides: dict[int, list[str]] = field(default_factory=dict)
    chosen: bool = False
    refused: str = ""
    state: int = 0
    gradients: int = 0
    freed: bool = False
    counted: dict[int, Activations] = field(default_factory=dict)

    def need(self, length: int) -> int:
        """Bytes of everything in the worst moment of forward and backward."""
        found = self.counted[length]
        return self.state + (found.freed if self.freed else max(found.held, self.gradients))


@dataclass
class Table:
    """What `mnemic plan --activations` prints. `given`: the budget was, and is not what is free."""

    name: str
    model: str
    parameters: int
    trained: int
    rows: int
    lengths: list[int]
    budget: int
    given: bool
    combinations: list[Combination] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def own(self) -> Combination:
        return next(c for c in self.combinations if c.chosen)

    def cheapest(self, length: int) -> Combination | None:
        """Of what fits, that which computes least; a sparse one only where no exact one fits."""
        fitting = [
            c for c in self.combinations if length in c.counted and c.need(length) <= self.budget
        ]
        exact = [c for c in fitting if c.exact]
        if not exact:
            return next(iter(fitting), None)
        return min(exact, key=lambda c: (c.counted[length].flops, not c.chosen, c.need(length)))

    def smallest(self, length: int) -> Combination | None:
        found = [c for c in self.combinations if length in c.counted and c.exact]
        return min(found, key=lambda c: c.need(length), default=None)


def activations(
    recipe: Recipe, *, lengths: list[int] | None = None, budget: int | None = None
) -> Table:
    """Count each combination at each of `lengths` tokens of a row (by default the recipe's).
    `budget`: bytes to fit into, by default those that are free here.
    """
    notes: list[str] = []
    recipe = _in_memory(recipe, notes)
    tokenizer, known = known_tokenizer(recipe, notes)
    device = run_device(recipe)
    shapes = [shapes_of(recipe, tokenizer if known else None, n).largest for n in lengths or [None]]
    machine, model = this_machine(device), empty_model(recipe, tokenizer, device)
    table = Table(
        recipe.name, describe(model), sum(p.numel() for p in model.parameters()),
        sum(p.numel() for _, p in trained(model)), shapes[0].rows, [s.width for s in shapes],
        budget or machine.device_available or machine.available, budget is not None, notes=notes,
    )  # fmt: skip
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and max(table.lengths) > limit:
        notes.append(f"the model has {limit:,} positions: a run with longer rows is refused")
    counter = _Counter(recipe, tokenizer, device, shapes)
    table.combinations = counter.rows(EXACT, exact=True)
    if any(table.cheapest(length) is None for length in table.lengths):
        table.combinations += counter.rows(SPARSE, exact=False)
    if not any(c.chosen for c in table.combinations):
        own = Combination("as the recipe has it", isinstance(recipe.tokens, NoTokens))
        table.combinations.append(counter.row(own, None))
    if any(not c.exact for c in table.combinations):
        notes.append(
            "with fewer tokens: counted as if the supervised ones had room in what is kept; the "
            "result is not that of all tokens"
        )
    if not table.own.counted:
        raise UserError(table.own.refused)
    return table


def _in_memory(recipe: Recipe, notes: list[str]) -> Recipe:
    if isinstance(recipe.update, StreamedUpdate):
        notes.append(
            "the model is counted in memory, with update=plain: of a streamed one only layer "
            "inputs are kept, which mnemic plan without --activations counts"
        )
        recipe = neighbour(recipe, "plain")
    if recipe.offload.activations != "device":
        notes.append(
            f"offload.activations={recipe.offload.activations} moves what is saved elsewhere; here "
            "it stays"
        )
    return recipe


@dataclass
class _Counter:
    recipe: Recipe
    tokenizer: Any
    device: torch.device
    shapes: list[Shape]

    def rows(self, table: dict[str, dict[str, Any]], *, exact: bool) -> list[Combination]:
        tree, found = dump_recipe(self.recipe), list[Combination]()
        for name, overrides in table.items():
            if not all(has(tree, key) for key in overrides if not key.startswith("tokens.")):
                continue
            row = self.row(Combination(name, exact), overrides)
            # Tiles of a row that is shorter than one change nothing.
            alike = [] if row.refused else [old for old in found if old.counted == row.counted]
            if row.chosen or not alike:
                found = [*(old for old in found if old not in alike), row]
        return found

    def row(self, row: Combination, overrides: dict[str, Any] | None) -> Combination:
        """Fill `row`, or say why it is none for this recipe. None: the recipe as it is."""
        try:
            for shape in self.shapes:
                self._count(row, overrides, shape)
        except RecipeError as error:
            row.refused = error.problems[0]
        except UserError as error:
            row.refused = str(error)
        except RuntimeError as error:
            reason = next((x.strip() for x in str(error).splitlines() if x.strip()), repr(error))
            row.refused = f"the model does not run without values ({reason[:100]})"
        if row.refused:
            row.counted.clear()
        return row

    def _count(self, row: Combination, overrides: dict[str, Any] | None, shape: Shape) -> None:
        recipe = self.recipe
        if overrides is not None:
            values = {k: v(shape.width) if callable(v) else v for k, v in overrides.items()}
            if "tokens.kind" in values and all_supervised(recipe):
                values["tokens.protect"] = False
            row.overrides[shape.width] = [f"{k}={str(v).lower()}" for k, v in values.items()]
            recipe = changed(recipe, values)
        row.chosen = row.chosen or dump_recipe(recipe) == dump_recipe(self.recipe)
        model = empty_model(recipe, self.tokenizer, self.device)
        row.state = weight_bytes(recipe, model) + state_bytes(recipe, model)
        row.gradients = gradient_bytes(model)
        row.freed = isinstance(recipe.update, InBackwardUpdate)
        with quiet():
            techniques(recipe, model, self.tokenizer)
        faked = fake(model, self.device, recipe.loop.precision)
        with kept_tokens(recipe, shape):
            row.counted[shape.width] = count_activations(faked, shape)
