"""Bytes of weights, gradients, optimizer state and checkpoints, from a model without weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.load import torch_dtype
from mnemic.optim.int8 import GROUP
from mnemic.optim.select import group_sizes, roles
from mnemic.train.errors import UserError
from mnemic.train.offload.build import skeleton
from mnemic.train.offload.skeleton import without_weights
from mnemic.train.optimizers import build_optimizer
from mnemic.train.recipe.distill import DistillObjective
from mnemic.train.recipe.model import Lora, QLora
from mnemic.train.recipe.optimizer import (
    Adafactor,
    AdamW,
    AdamW8bit,
    Apollo,
    ApolloMini,
    GaLore,
    Muon,
    Sgd,
)
from mnemic.train.recipe.recipe import Recipe

_NF4_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' blocks of weights, and of their scales


def empty_model(recipe: Recipe, tokenizer: Any, device: torch.device) -> Any:
    """The recipe's model without weights. Weights of 4 bits are made when weights are read, so that
    here they are as those of LoRA.
    """
    if isinstance(recipe.adapters, QLora):
        fields = recipe.adapters.model_dump(exclude={"kind", "double_quant"})
        recipe = recipe.model_copy(update={"adapters": Lora(**fields)})
    try:
        with quiet():
            return skeleton(recipe, tokenizer, device)
    except (ValueError, ImportError) as error:
        # An attention implementation or architecture that transformers does not have here.
        raise UserError(f"model: {str(error).splitlines()[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the tables and notes that a run logs once."""
    logger = logging.getLogger("mnemic")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def describe(model: Any) -> str:
    """`LlamaForCausalLM, 32 layers of 4096, vocabulary 128,256`."""
    text = model.config.get_text_config()
    return (
        f"{type(model).__name__}, {text.num_hidden_layers} layers of {text.hidden_size}, "
        f"vocabulary {text.vocab_size:,}"
    )


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weight_bytes(recipe: Recipe, model: nn.Module) -> int:
    """All weights and buffers as they are held in memory."""
    total = sum(map(_bytes, (*model.parameters(), *model.buffers())))
    if recipe.model.weights == "int8":
        body = {name for name, role in roles(model).items() if role == "matrix"}
        linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
        for name, param in model.named_parameters():
            if name in body and id(param) in linear:
                scales = param.shape[0] * -(-param.shape[1] // GROUP)
                total += param.numel() + 8 * scales - _bytes(param)
    if isinstance(recipe.adapters, QLora):
        total += _four_bit(model, recipe.adapters.double_quant)
    return total


def teacher_bytes(recipe: Recipe) -> int:
    """Weights of the teacher that objective `distill` holds beside the model; without its adapters,
    which are small.
    """
    part = recipe.objective
    if not isinstance(part, DistillObjective):
        return 0
    from transformers import AutoConfig

    from mnemic.train.objectives.teacher import teacher_folder

    extra = part.teacher.model_dump(include={"revision", "trust_remote_code"})
    try:
        with quiet():
            config = AutoConfig.from_pretrained(teacher_folder(part), **extra)
            model = without_weights(config, torch_dtype(part.teacher.dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((x for x in str(error).splitlines() if x.strip()), repr(error))
        raise UserError(f"objective.teacher: could not be read: {reason.strip()}") from error
    return sum(map(_bytes, (*model.parameters(), *model.buffers())))


def _four_bit(model: nn.Module, double: bool) -> int:
    """What NF4 changes: linear weights outside the head have 4 bits and scales, and peft turns
    everything else into fp32.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    packed = {
        id(m.weight) for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m is not head and ".lora_" not in name
    }  # fmt: skip
    change = 0
    for param in model.parameters():
        if id(param) not in packed:
            change += 0 if param.requires_grad else 4 * param.numel() - _bytes(param)
            continue
        blocks = -(-param.numel() // _NF4_BLOCK)
        scales = blocks + 4 * -(-blocks // _NESTED_BLOCK) if double else 4 * blocks
        change += param.numel() // 2 + scales - _bytes(param)
    return change


def gradient_bytes(model: nn.Module) -> int:
    """All gradients at once."""
    return sum(_bytes(param) for _, param in trained(model))


def largest_gradient(model: nn.Module) -> int:
    return max((_bytes(param) for _, param in trained(model)), default=0)


def state_bytes(recipe: Recipe, model: nn.Module) -> int:
    """The state of the recipe's optimizer after its first step, held in memory."""
    part = recipe.optimizer
    if isinstance(part, (Apollo, ApolloMini)):
        with quiet():
            optimizer = build_optimizer(part, model)
        cached = _cached_projections(part, optimizer) if part.cache_projection else 0
        return sum(s.state_bytes for s in group_sizes(optimizer.param_groups)) + cached
    if isinstance(part, (Muon, GaLore)):
        from mnemic.train.peers import _role_groups, _state_bytes

        groups = _role_groups(part, model)
        return sum(_state_bytes(group, p) for group in groups for p in group["params"])
    return sum(_state_of(part, param) for _, param in trained(model))


def _state_of(part: AdamW | AdamW8bit | Sgd | Adafactor, param: Tensor) -> int:
    size, count = param.element_size(), param.numel()
    if isinstance(part, AdamW):
        return 2 * size * count + 4
    if isinstance(part, AdamW8bit):
        # bitsandbytes: small tensors keep fp32 moments; blocks of 256 share a scale.
        return 8 * count if count < 4096 else 2 * count + 8 * -(-count // 256)
    if isinstance(part, Sgd):
        return size * count if part.momentum else 0
    if param.ndim < 2:
        return size * count + 4
    return size * (count // param.shape[-1] + count // param.shape[-2]) + 4


def _cached_projections(part: Apollo | ApolloMini, optimizer: Any) -> int:
    if part.proj != "gaussian":
        return 0
    from mnemic.optim.rules import rank_of, rule_of

    total = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if rule_of(group, param) == "apollo":
                total += min(param.shape[-2:]) * rank_of(group, param) * param.element_size()
    return total


def checkpoint_bytes(recipe: Recipe, model: nn.Module) -> int:
    """A checkpoint folder of a model in memory: trained weights and optimizer state."""
    weights = gradient_bytes(model)
    if recipe.model.weights == "int8":
        weights = weight_bytes(recipe, model)
    return weights + state_bytes(recipe, model)
