"""What a recipe can give up to take less memory, as overrides; and what that does to its result.

Levers that keep the result come in every combination; on top of them, where those are not enough,
rounding and another optimizer. Nothing is counted here: `choose.py` orders and counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from mnemic.train.recipe.load import apply_overrides, build_recipe, dump_recipe
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import (
    InBackwardUpdate,
    PlainUpdate,
    SftObjective,
    StreamedUpdate,
)

Overrides = dict[str, Any]

_TILED = 8192  # tokens of a row from which mlp_tile=auto has an effect (models/exact/tiles.py)
_CHUNKED = 256  # shorter rows are not worth cutting
_SHARES = (0.5, 0.25)  # of the tokens, that gradients go through
_TO_APOLLO = ("adamw", "adamw8bit", "apollo")


@dataclass(frozen=True)
class Grade:
    """What a choice changes beside memory and time: nothing, roundings, or the method itself."""

    rounds: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        return "another method" if self.methods else "rounds" if self.rounds else "exact"

    @property
    def order(self) -> tuple[int, int]:
        """Fewer inexact steps first; of as many, roundings before another method."""
        return len(self.rounds) + len(self.methods), len(self.methods)


@dataclass(frozen=True)
class Candidate:
    """`overrides` of the recipe as it was given. `group`: those that no lever below it changes, so
    that the last of a group takes the least.
    """

    overrides: Overrides
    group: str
    last: bool

    def recipe(self, given: Recipe) -> Recipe:
        """`RecipeError` where validation refuses it."""
        return changed(given, self.overrides) if self.overrides else given


def changed(given: Recipe, overrides: Overrides) -> Recipe:
    tree = dump_recipe(given)
    apply_overrides(tree, [(key.split("."), value) for key, value in overrides.items()])
    return build_recipe(tree)


def as_arguments(overrides: Overrides) -> str:
    """As the command line takes them."""

    def text(value: Any) -> str:
        return "null" if value is None else str(value).lower() if value in (True, False) else value

    return " ".join(f"{key}={text(value)}" for key, value in overrides.items())


def inexact(recipe: Recipe) -> list[list[Overrides]]:
    """Overrides that change the result, each list those with one step more: the first has none."""
    axes: list[list[Overrides]] = []
    if recipe.model.dtype == "fp32":
        axes.append([{}, {"model.dtype": "bf16"}])
    if not isinstance(recipe.adapters, NoAdapters):
        if getattr(recipe.offload, "base", "full") == "full":
            axes.append([{}, {"offload.base": "int8"}, {"offload.base": "nf4"}])
    elif recipe.optimizer.kind in _TO_APOLLO:
        axes.append([{}, {"optimizer.kind": "apollo_mini"}])
        if recipe.optimizer.kind == "adamw":
            axes[-1].insert(1, {"offload.states": "8bit"})
    if recipe.tokens.kind == "none" and _has_prompts(recipe):
        kept = ({"tokens.kind": "protect", "tokens.keep": share} for share in _SHARES)
        axes.append([{}, *kept])
    levels: list[list[Overrides]] = [[] for _ in range(len(axes) + 1)]
    for parts in product(*axes):
        levels[sum(map(bool, parts))].append({k: v for part in parts for k, v in part.items()})
    return levels


def _has_prompts(recipe: Recipe) -> bool:
    """Whether there are tokens without a loss of their own, which `protect` may leave out."""
    objective = recipe.objective
    return isinstance(objective, SftObjective) and objective.loss_on == "completion"


def candidates(recipe: Recipe, width: int, extra: Overrides) -> Iterator[Candidate]:
    """Every combination of the levers that keep the result, with `extra`; mildest first.

    `width`: tokens of a row.
    """
    for way in ways(recipe):
        streamed = way.get("update.kind", recipe.update.kind) == "streamed"
        ssd = way.get("offload.kind", recipe.offload.kind) == "ssd"
        if ("offload.states" in extra and not streamed) or ("offload.base" in extra and not ssd):
            continue
        # A streamed layer keeps its input only, and its head never makes all logits.
        techniques = [{}] if streamed else _techniques(recipe, width)
        axes = [techniques, _micro_batches(recipe), _evaluations(recipe), _activations(recipe)]
        every = [dict[str, Any]()]
        for axis in axes:
            every = [{**old, **new} for old in every for new in axis]
        for position, parts in enumerate(every):
            group = as_arguments({**way, **extra})
            last = position == len(every) - 1
            yield Candidate({**way, **parts, **extra}, group, last)


def ways(recipe: Recipe) -> list[Overrides]:
    """When gradients become weights, and where the model lies; clipped as before where that can
    be.
    """
    update, found = recipe.update, list[Overrides]([{}])
    norm = update.max_grad_norm
    if isinstance(update, PlainUpdate):
        inside: Overrides = {"update.kind": "in_backward"}
        if norm is not None:
            inside |= {"update.clip": "previous_norm", "update.max_grad_norm": norm}
        found.append(inside)
    if isinstance(update, StreamedUpdate):
        return [*found, {"offload.kind": "ssd"}] if recipe.offload.kind == "host" else found
    clips = ["none"]
    if isinstance(update, InBackwardUpdate):
        clips = [update.clip]
    elif norm is not None:
        # With adapters exact_spill writes nothing; else each is exact and each has its price.
        full = isinstance(recipe.adapters, NoAdapters)
        clips = ["exact_spill", "speculative"] if full else ["exact_spill"]
    off: Overrides = {}
    if recipe.loop.gradient_checkpointing:
        # Without effect there, which the run would say.
        off = {"loop.gradient_checkpointing": False}
        off |= {"loop.checkpoint_every": 1} if recipe.loop.checkpoint_every > 1 else {}
    for kind, clip in product(("host", "ssd"), clips):
        clipping = {} if clip == "none" else {"update.clip": clip, "update.max_grad_norm": norm}
        found.append({"update.kind": "streamed", **clipping, "offload.kind": kind, **off})
    return found


def _techniques(recipe: Recipe, width: int) -> list[Overrides]:
    loop, found = recipe.loop, list[Overrides]([{}])
    loss: Overrides = {} if loop.loss == "chunked" else {"loop.loss": "chunked"}
    again: Overrides = {} if loop.gradient_checkpointing else {"loop.gradient_checkpointing": True}
    if loop.checkpoint_every > 1:
        again["loop.checkpoint_every"] = 1
    found += [loss, again, {**again, **loss}]
    if loop.mlp_tile == "none" and width > _TILED:
        found.append({**again, **loss, "loop.mlp_tile": "auto"})
    if loop.sequence_chunk is None and width >= _CHUNKED:
        chunk = min(2048, max(64, width // 4 // 64 * 64))
        found.append({**again, **loss, "loop.sequence_chunk": chunk})
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _micro_batches(recipe: Recipe) -> list[Overrides]:
    """As it is, halves that divide the batch, and one row."""
    batch = recipe.loop.batch_size
    micro = recipe.loop.micro_batch_size or batch
    sizes, free = [], isinstance(recipe.objective, GrpoObjective)
    size = micro // 2
    while size > 1:
        if free or batch % size == 0:
            sizes.append(size)
        size //= 2
    sizes = [*sizes[:3], 1] if micro > 1 else []
    return [{}, *({"loop.micro_batch_size": size} for size in sizes)]


def _evaluations(recipe: Recipe) -> list[Overrides]:
    part = recipe.evaluation
    if part is None or part.batch_size == 1:
        return [{}]
    sizes = dict.fromkeys((max(1, part.batch_size // 4), 1))
    return [{}, *({"evaluation.batch_size": size} for size in sizes)]


def _activations(recipe: Recipe) -> list[Overrides]:
    kept = recipe.offload.activations == "ssd"
    return [{}] if kept else [{}, {"offload.activations": "ssd"}]


def grade(given: Recipe, new: Recipe) -> Grade:
    """What `new` computes otherwise than `given`, past the order of sums."""
    rounds, methods = [], []
    full = isinstance(new.adapters, NoAdapters)
    streams = isinstance(new.update, StreamedUpdate) and not isinstance(
        given.update, StreamedUpdate
    )
    if new.optimizer.kind != given.optimizer.kind:
        methods.append(f"{new.optimizer.kind} in place of {given.optimizer.kind}")
    states = getattr(new.offload, "states", "fp32")
    if states != getattr(given.offload, "states", "fp32"):
        methods.append(f"AdamW's moments in {states}")
    clip = getattr(new.update, "clip", "none")
    if isinstance(given.update, PlainUpdate) and clip == "previous_norm":
        methods.append("clips by the norm of the step before")
    if new.model.dtype != given.model.dtype:
        rounds.append(f"weights in {new.model.dtype}")
    if new.tokens.kind != given.tokens.kind:
        share = getattr(new.tokens, "keep", 1.0)
        methods.append(f"gradients through {share:.0%} of the tokens, supervised ones among them")
    base = getattr(new.offload, "base", "full")
    if base != getattr(given.offload, "base", "full"):
        rounds.append(f"the frozen base in {base}")
    if full and streams and new.optimizer.kind == "adamw" and given.model.dtype == "bf16":
        rounds.append("AdamW with fp32 moments and master weights, where bf16 ones were")
    sums = full and new.model.dtype == "bf16" and not isinstance(new.update, StreamedUpdate)
    if sums and _pieces(new) > _pieces(given):
        rounds.append("gradients of micro-batches add up in bf16")
    moved = streams or _pieces(new) != _pieces(given)
    if getattr(new.adapters, "dropout", 0.0) and (
        moved or new.loop.sequence_chunk != given.loop.sequence_chunk
    ):
        rounds.append("dropout draws other numbers")
    return Grade(tuple(rounds), tuple(methods))


def _pieces(recipe: Recipe) -> int:
    """Micro-batches of a step."""
    return -(-recipe.loop.batch_size // (recipe.loop.micro_batch_size or recipe.loop.batch_size))
