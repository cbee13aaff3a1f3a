"""Activations by formula, for a model that does not run on fake tensors: one that looks at values
on its way, such as code of its own (trust_remote_code).

A layer saves some 34 bytes for each token and channel at 16 bits, twice that at 32 (Korthikanti et
al., arXiv 2205.05198, without attention scores); with checkpointing its input, and all of that of
one layer at a time.
"""

from typing import Any

import torch

from mnemic.train.plan.layer import Layer
from mnemic.train.plan.live import Counted, Peak
from mnemic.train.plan.shapes import Shape

_SAVED = 17  # values of 16 bits for each token and channel


def guessed_training(model: Any, shape: Shape, checkpointing: bool) -> Counted:
    """As `live.training` counts it."""
    config = model.config.get_text_config()
    grads = [p.numel() * p.element_size() for p in model.parameters() if p.requires_grad]
    one, size = _layer(model, shape), _size(model)
    inputs = shape.tokens * config.hidden_size * size
    layers = config.num_hidden_layers
    saved = layers * inputs + 2 * one if checkpointing else layers * one
    logits = guessed_logits(model, shape)
    two = 2 * max(grads, default=0)
    return Counted(
        Peak(0, saved + logits + two, saved, logits + two),
        Peak(sum(grads), saved + logits, saved, logits + sum(grads)),
    )


def guessed_logits(model: Any, shape: Shape) -> int:
    """Logits, their fp32 form, and the gradient of that."""
    vocabulary = model.config.get_text_config().vocab_size
    return shape.head_tokens * vocabulary * (_size(model) + 8)


def guessed_layer(model: Any, gradient: int, shape: Shape) -> Layer:
    """As `plan_layer.layer` counts it; `gradient`: bytes of the layer's gradients."""
    hidden = shape.tokens * model.config.get_text_config().hidden_size * _size(model)
    one = _layer(model, shape)
    return Layer(hidden, 0, one // 2, 2 * one + gradient // 2, gradient // 2)


def _size(model: Any) -> int:
    dtypes = {p.dtype for p in model.parameters()}
    return 4 if torch.float32 in dtypes else 2


def _layer(model: Any, shape: Shape) -> int:
    return _SAVED * shape.tokens * model.config.get_text_config().hidden_size * _size(model)
