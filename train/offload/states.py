"""AdamW's state of a tile, in four forms; the step of a tile.

    master   fp32 weight, exp_avg, exp_avg_sq       12 bytes an element, for bf16 weights
    fp32     exp_avg, exp_avg_sq                     8, for fp32 weights (or bf16 without master)
    bf16     exp_avg, exp_avg_sq, rounded stochastically  4
    8bit     one byte each and two scales a block    2.03 (optim/eightbit.py)

Without a master, bf16 weights are rounded stochastically (optim/write.py). A tile that was never
written is all zeros; a master then starts from the weight.
"""

from typing import Any

import torch
from torch import Tensor

from mnemic.optim.adamw import adamw_step
from mnemic.optim.eightbit import BLOCK
from mnemic.optim.lowrank import adam_direction_
from mnemic.optim.random import stream_key
from mnemic.optim.write import Noise, round_to_bf16_, rounding_noise, write
from mnemic.train.offload.layout import Spec, pack

FORMS = ("master", "fp32", "bf16", "8bit")


def state_specs(form: str, numel: int) -> tuple[list[Spec], int]:
    """The tensors of a tile of `numel` elements, and their bytes."""
    flat, wide, half = (numel,), torch.float32, torch.bfloat16
    blocks = (-(-numel // BLOCK),)
    if form == "8bit":
        return pack(
            [
                ("exp_avg", flat, torch.int8), ("exp_avg_sq", flat, torch.uint8),
                ("exp_avg_scale", blocks, wide), ("exp_avg_sq_scale", blocks, wide),
            ]
        )  # fmt: skip
    kind = half if form == "bf16" else wide
    tensors = [("exp_avg", flat, kind), ("exp_avg_sq", flat, kind)]
    if form == "master":
        tensors.insert(0, ("master", flat, wide))
    return pack(tensors)


def state_views(form: str, numel: int, buffer: Tensor) -> dict[str, Tensor]:
    specs, _ = state_specs(form, numel)
    return {spec.name: spec.view(buffer) for spec in specs}


def tile_step(
    form: str, weight: Tensor, grad: Tensor, state: dict[str, Any], *, fresh: bool, step: int,
    group: dict[str, Any], key: tuple[object, ...], first_row: int,
) -> None:  # fmt: skip
    """One AdamW step of `weight` (rows, cols), in place, as `Apollo` with rule "adamw" makes it.

    `fresh`: the state was never written. `step` counts from 1. `key` names the random stream of
    the tensor and `first_row` the tile's place in it, so that tiles change no bit.
    """
    settings: dict[str, Any] = {
        "step": step, "lr": float(group["lr"]), "weight_decay": group["weight_decay"],
        "betas": group["betas"], "eps": group["eps"],
    }  # fmt: skip
    if form == "master":
        master = state["master"].view(weight.shape)
        if fresh:
            master.copy_(weight)
        adamw_step(master, grad.float(), _shaped(state, weight), noise=None, **settings)
        weight.copy_(master)
        return
    noise: Noise | None = None
    if weight.dtype == torch.bfloat16 and group["rounding"] == "stochastic":
        noise = rounding_noise(stream_key(*key, step), weight, first_row)
    if form == "bf16":
        _bf16_step(weight, grad, state, noise, key, first_row, settings)
        return
    eight_bit = form == "8bit"
    moments = state if eight_bit else _shaped(state, weight)
    adamw_step(weight, grad, moments, noise=noise, **settings)


def _shaped(state: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    return {key: value.view(weight.shape) for key, value in state.items() if key != "master"}


def _bf16_step(
    weight: Tensor, grad: Tensor, state: dict[str, Any], noise: Noise | None,
    key: tuple[object, ...], first_row: int, settings: dict[str, Any],
) -> None:  # fmt: skip
    """Moments in fp32 for the step, then rounded: to nearest, a second moment would lose every
    change below 1/256 of it, which with beta2 = 0.999 is all of them.
    """
    names = ("exp_avg", "exp_avg_sq")
    exact = [state[name].view(weight.shape).float() for name in names]
    direction = grad.float().clone()
    step, lr = settings["step"], settings["lr"]
    adam_direction_([direction], [exact[0]], [exact[1]], settings["betas"], settings["eps"], step)
    for name, value in zip(names, exact, strict=True):
        row, col = rounding_noise(stream_key(*key, name, step), value, first_row)
        round_to_bf16_(state[name].view(weight.shape), value, row, col)
    factor = torch.full((1, 1), lr, dtype=torch.float32, device=weight.device)
    write(weight, direction, factor, 1 - lr * settings["weight_decay"], noise)
