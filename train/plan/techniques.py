"""The techniques that save activations, as overrides of a recipe; and what puts them on a model.

A technique that gets a key in the recipe needs one row here, and counts by being run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mnemic.models.tokens import scores, sparsity
from mnemic.train.exact import checkpoint_layers
from mnemic.train.plan.shapes import Shape
from mnemic.train.recipe.load import apply_overrides, build_recipe, dump_recipe
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.tokens import NoTokens
from mnemic.train.tokens import install_tokens, to_config


def chunk_of(tokens: int) -> int:
    """Eight chunks of a long row: each takes fake tensors a tenth of a second, of each layer."""
    return max(2048, tokens // 8)


OFF: dict[str, Any] = {
    "adapters.compute": "model",
    "loop.gradient_checkpointing": False,
    "loop.checkpoint_every": 1,
    "loop.loss": "auto",
    "loop.mlp_tile": "none",
    "loop.sequence_chunk": None,
    "tokens.kind": "none",
}
"""What every combination starts from, as far as the recipe has these keys."""
_CHECKPOINTS, _TILES = {"loop.gradient_checkpointing": True}, {"loop.mlp_tile": "auto"}
EXACT: dict[str, dict[str, Any]] = {
    "as peft: fp32 inputs, logits": {"adapters.compute": "fp32", "loop.loss": "logits"},
    "dense, all logits": {"loop.loss": "logits"},
    "dense": {},
    "MLP in tiles": _TILES,
    "every 2nd layer recomputed": _CHECKPOINTS | {"loop.checkpoint_every": 2},
    "checkpointing, all logits": _CHECKPOINTS | {"loop.loss": "logits"},
    "checkpointing": _CHECKPOINTS,
    "checkpointing, MLP in tiles": _CHECKPOINTS | _TILES,
    "layers in chunks": _CHECKPOINTS | {"loop.sequence_chunk": chunk_of},
}
"""Name -> overrides, values or functions of the tokens of a row. A row with a key that the recipe
does not have is left out.
"""
SPARSE: dict[str, dict[str, Any]] = {
    "gradients through a quarter": {"tokens.kind": "protect", "tokens.keep": 0.25},
    "checkpointing, half of tokens": _CHECKPOINTS | {"tokens.kind": "drop", "tokens.keep": 0.5},
    "checkpointing, a quarter": _CHECKPOINTS | {"tokens.kind": "drop", "tokens.keep": 0.25},
}
"""The same for token sparsity, an approximation; the mildest first."""


def changed(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """The recipe under `OFF` and these."""
    tree = dump_recipe(recipe)
    keys = {key: value for key, value in OFF.items() if has(tree, key)} | overrides
    apply_overrides(tree, [(key.split("."), value) for key, value in keys.items()])
    return build_recipe(tree)


def has(tree: Any, key: str) -> bool:
    first, _, rest = key.partition(".")
    return isinstance(tree, dict) and first in tree and (not rest or has(tree[first], rest))


def all_supervised(recipe: Recipe) -> bool:
    """Whether every token is learned, so that none can be dropped where those are protected."""
    return getattr(recipe.objective, "loss_on", "all") == "all"


def techniques(recipe: Recipe, model: Any, tokenizer: Any) -> None:
    """What is done to a built model beside what `empty_model` did: recompute, drop tokens."""
    if recipe.loop.gradient_checkpointing:
        adapted = not isinstance(recipe.adapters, NoAdapters)
        checkpoint_layers(recipe.loop, model, adapted=adapted)
    install_tokens(recipe, model, tokenizer)


@contextmanager
def kept_tokens(recipe: Recipe, shape: Shape) -> Iterator[None]:
    """Tells token sparsity what it cannot see in fake tensors: how many tokens no score may drop,
    and which queries it looks at.
    """
    part = recipe.tokens
    if isinstance(part, NoTokens):
        yield
        return
    planned = _required(recipe, shape)

    def spread(found: Tensor) -> Tensor:
        return torch.arange(min(len(found), scores._QUERIES), device=found.device)

    row = partial(sparsity.Row, planned=planned)
    with mock.patch.object(sparsity, "Row", row), mock.patch.object(scores, "_spread", spread):
        yield


def kept_count(recipe: Recipe, shape: Shape) -> int | None:
    """Tokens of a row that gradients go through in every layer of a streamed model; None for all,
    in some layer at least.
    """
    part = recipe.tokens
    if isinstance(part, NoTokens) or part.layers != "all":
        return None
    row = sparsity.Row(torch.zeros(1, shape.width, dtype=torch.bool))
    row.planned = _required(recipe, shape)
    return row.count(to_config(part), part.keep)


def _required(recipe: Recipe, shape: Shape) -> int:
    """Tokens of a row that no score may drop."""
    part = recipe.tokens
    assert not isinstance(part, NoTokens)
    supervised = shape.columns + 1 if part.protect and shape.columns is not None else 0
    return part.block * (part.sinks + part.recent) + supervised
