"""What a checkpoint holds of a run, as tensors and plain values: trained weights and the trainer's
state.

One process and DDP write `model.safetensors` + `trainer.pt`. Under FSDP2 each rank writes its rows
(sharded.py); DeepSpeed keeps model and optimizer in its own layout under `accelerate/`, in the same
atomic folder.
"""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemic.optim.int8 import Int8Weight
from mnemic.train.errors import UserError


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters (tied ones once) and persistent buffers, by name; shared with
    the model. An int8 weight is its parts: `name.codes`, `name.scale` and `name.zero`.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        if isinstance(param, Int8Weight):
            parts, _ = param.__tensor_flatten__()
            tensors.update({f"{name}.{part}": getattr(param, part) for part in parts})
        else:
            tensors[name] = param.detach()
    persistent = module.state_dict().keys()
    tensors.update({n: b.detach() for n, b in module.named_buffers() if n in persistent})
    return tensors


def load_trained(module: nn.Module, path: Path) -> None:
    """Copy `model.safetensors` into the module; other names or shapes are an error, never passed
    over.
    """
    from safetensors.torch import load_file

    saved, present = load_file(path), trained_tensors(module)
    if saved.keys() != present.keys():
        odd = sorted(saved.keys() ^ present.keys())
        raise UserError(
            f"{path}: holds other weights than this model trains ({len(odd)} names differ, "
            f"such as {odd[0]}); resume with the recipe that wrote it"
        )
    with torch.no_grad():
        for name, tensor in present.items():
            if tensor.shape != saved[name].shape:
                raise UserError(
                    f"{path}: {name} is {tuple(saved[name].shape)}, the model's is "
                    f"{tuple(tensor.shape)}; resume with the recipe that wrote it"
                )
            tensor.copy_(saved[name])


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in tensors.items()}, path, {"format": "pt"})


def bytes_of(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(bytes_of(v) for v in state.values())
    if isinstance(state, (list, tuple)):
        return sum(bytes_of(v) for v in state)
    return 0


def autocast_of(device: torch.device, precision: str) -> Any:
    """The context of a forward: bf16 autocast where `precision` says so."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed python, numpy and torch for one step.

    Randomness is a function of (seed, step, rank), so there is no generator state to save: a
    resumed run draws the numbers it would have drawn, whatever an evaluation or a callback drew in
    between.
    """
    value = random.Random(f"{seed}/{step}/{rank}").getrandbits(63)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    torch.manual_seed(value)
