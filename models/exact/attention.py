"""A decoder layer's own code with another attention inside.

transformers looks up `config._attn_implementation` in one table whenever an attention module runs,
and hands over queries, keys and values as they are after projections, norms, rotation and biases.
So a function put there works on every architecture: to look at queries and keys (`capture`), and to
let some rows of a sequence attend to all keys before them (`RowAttention`), with the masks that the
model made.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "mnemic_rows"

Attention = Callable[..., tuple[Tensor, Any]]
"""(module, query (B, Hq, T, D), key (B, Hk, S, D), value, mask, **keywords) -> (B, T, Hq, D)."""

_current: list[tuple[Attention, str]] = []
"""Functions in force, the innermost last, and the implementation that they stand in for."""


def _dispatch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any):
    return _current[-1][0](module, query, key, value, mask, **kw)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of layers of a transformers decoder; ValueError where there is none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = inner.config.get_text_config().num_hidden_layers
    lists = {
        name: module for name, module in inner.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }  # fmt: skip
    if not lists:
        raise ValueError(f"{type(inner).__name__} has no list of {count} decoder layers")
    return min(lists.items(), key=lambda item: item[0].count("."))[1]


def attention_of(layer: nn.Module) -> nn.Module:
    """The layer's attention module: the outermost whose class says so."""
    for _, module in layer.named_modules():
        name = type(module).__name__
        if name.endswith("Attention") and hasattr(module, "config"):
            return module
    raise ValueError(f"{type(layer).__name__} has no attention module of transformers")


def by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a layer was called with beside its hidden states, all by name (GPT-2 gives the mask by
    position).
    """
    names = list(inspect.signature(type(layer).forward).parameters)[2:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_masks(model: Any) -> None:
    """ValueError where attention takes no mask, so that rows cannot be told what they may see."""
    name = model.config.get_text_config()._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ValueError(f"needs attention sdpa or eager, and this model has {name}")


def attend_rows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Any]:
    """The module's own attention, by queries (B, Hq, T, D) that are some rows of a sequence over
    keys (B, Hk, S, D). `mask`: as `visible` gives it; None is causal with T = S.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation_internal  # type: ignore[union-attr]
    if name == NAME:
        name = _current[-1][1]
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, **kw)
    own = sys.modules[type(module).__module__].eager_attention_forward
    if mask is None:
        places = torch.arange(query.shape[2], device=query.device)
        mask = visible(places, key.shape[2], None, slice(None))
    if mask is not None and mask.dtype == torch.bool:
        low = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, low)
    return own(module, query, key, value, mask, **kw)


@contextmanager
def attending(module: nn.Module, function: Attention) -> Iterator[None]:
    """Inside, `module` (an attention module of transformers) computes its attention by
    `function`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _dispatch)
    config: Any = module.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    _current.append((function, _current[-1][1] if before == NAME else before))
    try:
        yield
    finally:
        _current.pop()
        config._attn_implementation_internal = before


class _Captured(Exception):
    """Queries, keys and values are there: the rest of the layer is not wanted."""


def capture(
    layer: nn.Module, run: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(query (B, Hq, S, D), key (B, Hk, S, D), value, scaling) of `layer` on `hidden`: the cost of
    one norm and three projections, with gradients where they are enabled. `run`: the layer's
    forward.
    """
    found: list[Any] = []

    def look(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any):
        del mask
        scale = kw.get("scaling")
        found[:] = query, key, value, query.shape[-1] ** -0.5 if scale is None else scale
        raise _Captured

    module = attention_of(layer)
    with attending(module, look):
        try:
            run(hidden, *args, **kwargs)
        except _Captured:
            pass
        else:
            raise RuntimeError(
                f"{type(module).__name__} does not use transformers' attention table"
            )
    query, key, value, scaling = found
    return query, key, value, scaling


def visible(positions: Tensor, keys: int, mask: Tensor | None, rows: Any) -> Tensor | None:
    """The mask of queries at `positions` (T,) over the first `keys` keys: of the model's 4-D `mask`
    the `rows`, else causal, bool (1, 1, T, keys); a 2-D mask (B, S) names the keys that are no
    padding.
    """
    if mask is not None and mask.ndim == 4:
        return mask[:, :, rows, :keys]
    causal = positions[:, None] >= torch.arange(keys, device=positions.device)[None]
    found = causal[None, None]
    if mask is not None:
        found = found & mask[:, None, None, :keys].bool()
    return found


def plain_forward(layer: nn.Module, own: Any = None) -> Callable[..., Any]:
    """The layer's own forward, neither checkpointed nor in chunks. `own`: what to begin with, where
    something else stands in front of it (a streamed model's).
    """
    own = own or layer.forward
    while hasattr(own, "own"):
        own = own.own

    def run(*args: Any, **kwargs: Any) -> Any:
        before = getattr(layer, "gradient_checkpointing", False)
        layer.gradient_checkpointing = False  # type: ignore[assignment]
        try:
            return own(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = before  # type: ignore[assignment]

    return run
