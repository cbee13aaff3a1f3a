"""The recipe's exact savings on a model: same loss and gradients, less activation memory."""

import os
from typing import Any

from mnemic.models.exact.loss import loss_head
from mnemic.models.exact.stream import stream_layers
from mnemic.models.exact.tiles import tile_mlps
from mnemic.train.errors import UserError
from mnemic.train.recipe.training import Loop


def install(loop: Loop, model: Any) -> None:
    """Sequence chunks, MLP tiles and the kind of loss, on a model with its adapters."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    # ZeRO-3 holds the head's weights during the head's own forward only.
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero and loop.loss == "chunked":
        raise UserError(
            "loop.loss=chunked runs the head again in the backward, when DeepSpeed holds its "
            "weights no longer; set it to auto, or launch with DDP or FSDP2"
        )
    loss_head(inner, "logits" if zero else loop.loss)
    try:
        if loop.mlp_tile != "none":
            tile_mlps(model, None if loop.mlp_tile == "auto" else loop.mlp_tile)
    except ValueError as error:
        raise UserError(f"loop.mlp_tile={loop.mlp_tile}: {error}; set it to none") from error
    try:
        if loop.sequence_chunk:
            stream_layers(model, loop.sequence_chunk)
    except ValueError as error:
        raise UserError(
            f"loop.sequence_chunk={loop.sequence_chunk}: {error}; set it to null"
        ) from error


def checkpoint_layers(loop: Loop, model: Any, *, adapted: bool) -> None:
    """Turn on the recipe's gradient checkpointing."""
    # transformers 5 renames it on the way; the first argument is the same.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    # With parameters on NVMe, DeepSpeed 0.19 gives wrong gradients without a word when a layer
    # is recomputed non-reentrantly.
    reentrant = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if reentrant and adapted:
        model.enable_input_require_grads()
    enable({"use_reentrant": reentrant})
    if loop.checkpoint_every > 1:
        from mnemic.models.exact.attention import decoder_layers

        for index, layer in enumerate(decoder_layers(model)):
            if index % loop.checkpoint_every:
                layer.gradient_checkpointing = False  # type: ignore[assignment]
