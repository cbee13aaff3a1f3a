"""A transformers decoder without its weights: real modules and buffers, parameters without memory.

A parameter that is not in memory is one NaN number seen through strides of zero: it has shape,
dtype and numel, so peft, optimizers and the planner can use it, and computing with it by mistake
gives NaN instead of a wrong number. A layer's parameters get their content by `param.data = ...`
while its slot is taken.

Layers, embedding and head are run by whoever holds the skeleton: their `forward` is set to a
function of his. The model's own forward stays what it is, so masks, rotary angles, scalings and
generation need no code for each architecture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.train.errors import UserError


def placeholder(like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Shape and dtype of `like`, one NaN of memory."""
    device = like.device if device is None else device
    return torch.full((1,), float("nan"), dtype=like.dtype, device=device).expand(like.shape)


def without_weights(
    config: Any, dtype: torch.dtype, device: torch.device | str = "cpu",
    attention: str | None = None,
) -> Any:  # fmt: skip
    """The causal LM of `config`, every parameter a placeholder of `dtype` (or of the wider type the
    model insists on), buffers real.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    settings = {"attn_implementation": attention} if attention else {}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **settings)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(placeholder(param, device)))
        # Not model.to(): it would give the placeholders memory.
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    tie(model)
    return model


def tie(model: Any) -> None:
    """Make the head's weight the embedding's, where the configuration says so."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.get_text_config().tie_word_embeddings:
        head.weight = embedding.weight


@dataclass
class Anatomy:
    """The parts of a causal LM (without peft's wrapper) that are run apart."""

    model: Any
    base: Any
    layers: nn.ModuleList
    layers_name: str
    embedding: nn.Embedding
    head: nn.Module

    @property
    def tied(self) -> bool:
        return self.head.weight is self.embedding.weight

    def layer_parameters(self, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """(full name, parameter) of layer `index`."""
        prefix = f"{self.layers_name}.{index}."
        for name, param in self.layers[index].named_parameters():
            yield prefix + name, param

    def vocabulary(self) -> dict[str, nn.Parameter]:
        """Embedding and head matrices by full name; a tied one once."""
        parts = [self.embedding] if self.tied else [self.embedding, self.head]
        return {
            f"{name_of(self.model, part)}.weight": part.get_parameter("weight") for part in parts
        }

    def rest(self) -> dict[str, nn.Parameter]:
        """Everything else, such as the last norm and learned positions: always in memory."""
        apart = {id(p) for p in self.vocabulary().values()}
        apart |= {id(p) for p in self.layers.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in apart}


def is_adapter(name: str) -> bool:
    """Whether a parameter is peft's own: in memory, trained or (`freeze_a`) not."""
    return ".lora_" in name


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in model.named_modules() if m is module)


def dissect(model: Any) -> Anatomy:
    """Find the parts; `UserError` where the model has no uniform list of layers."""
    kind = type(model).__name__
    base, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }  # fmt: skip
    if base is model or head is None or not isinstance(embedding, nn.Embedding) or not lists:
        raise UserError(
            f"update.kind=streamed: {kind} is not a decoder with a list of layers, an embedding "
            "and a head, which streaming needs; set update.kind=in_backward"
        )
    name, layers = min(lists.items(), key=lambda item: item[0].count("."))
    shared = {id(p) for p in layers.parameters()}
    outside = [p for n, p in model.named_parameters() if not n.startswith(name + ".")]
    if any(id(p) in shared for p in outside):
        raise UserError(
            f"update.kind=streamed: {kind} shares weights between its layers and the rest of the "
            "model; set update.kind=in_backward"
        )
    return Anatomy(model, base, layers, name, embedding, head)


def set_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `module(...)` run `function`; returns the module's own forward."""
    own = module.forward
    module.forward = function  # type: ignore[method-assign]
    return own
