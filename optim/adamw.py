"""AdamW (arXiv 1711.05101) for what is no matrix of the network's body: embeddings, head, vectors.

Moments are fp32 for weights of any dtype, or one byte each (`eightbit.py`); bf16 weights are
rounded stochastically. Large tensors are worked on in parts, so that no temporary is of their size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from mnemic.optim.eightbit import BLOCK, dequantize, quantize, zeros
from mnemic.optim.lowrank import adam_direction_
from mnemic.optim.write import Noise, write

# Elements worked on at a time where fp32 copies are needed.
_PART = 1 << 20
# Smaller tensors keep fp32 moments: their state is nothing, their values often matter.
_SMALL = 4096


def new_state(param: Tensor, *, eight_bit: bool) -> dict[str, Any]:
    """Moments for the local data `param`."""
    if eight_bit and param.numel() >= _SMALL:
        return zeros(param)
    exact = torch.float64 if param.dtype == torch.float64 else torch.float32
    # torch's kernel walks weight and moments alike; our parts of narrower weights are rows.
    layout = torch.preserve_format if param.dtype == exact else torch.contiguous_format
    return {
        name: torch.zeros_like(param, dtype=exact, memory_format=layout)
        for name in ("exp_avg", "exp_avg_sq")
    }


def adamw_step(
    weight: Tensor, grad: Tensor, state: dict[str, Any], *, step: int, lr: float,
    weight_decay: float, betas: tuple[float, float], eps: float, noise: Noise | None,
) -> None:  # fmt: skip
    """One AdamW step, `step` counted from 1, in place on the local data `weight` (any shape)."""
    if weight.numel() == 0:
        return
    eight_bit = "exp_avg_scale" in state
    if not eight_bit and weight.dtype in (torch.float32, torch.float64):
        # The kernel adds 1 to its step number.
        count = torch.full((), step - 1, dtype=torch.float32, device=weight.device)
        fused_adamw(
            [weight], [grad.to(weight.dtype)], [state["exp_avg"]], [state["exp_avg_sq"]], [],
            [count], fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
            lr=lr, weight_decay=weight_decay, eps=eps,
        )  # fmt: skip
        return
    if weight.ndim < 2:
        weight, grad = weight.view(1, -1), grad.reshape(1, -1)
    cols = weight.numel() // weight.shape[0]
    # Parts begin at whole rows and, with one-byte moments, at whole blocks.
    unit = BLOCK // math.gcd(BLOCK, cols) if eight_bit else 1
    rows = unit * max(1, _PART // (unit * cols))
    factor = torch.full((1,) * weight.ndim, lr, dtype=torch.float32, device=weight.device)
    for first in range(0, weight.shape[0], rows):
        part = slice(first, first + rows)
        direction = torch.empty(grad[part].shape, device=grad.device).copy_(grad[part])
        if eight_bit:
            flat = slice(first * cols, first * cols + direction.numel())
            exp_avg, exp_avg_sq = dequantize(state, flat)
        else:
            exp_avg = state["exp_avg"].view(weight.shape)[part].reshape(-1)
            exp_avg_sq = state["exp_avg_sq"].view(weight.shape)[part].reshape(-1)
        adam_direction_([direction.view(-1)], [exp_avg], [exp_avg_sq], betas, eps, step)
        if eight_bit:
            quantize(state, flat, exp_avg, exp_avg_sq)
        per_row = math.prod(weight.shape[1:-1])
        rounding = None
        if noise is not None:
            rounding = noise[0][first * per_row : (first + rows) * per_row], noise[1]
        write(weight[part], direction, factor, 1 - lr * weight_decay, rounding)


def state_bytes(size: int, wide: int, *, eight_bit: bool) -> int:
    """Bytes of both moments of `size` elements, `wide` bytes each unless `eight_bit`."""
    if eight_bit and size >= _SMALL:
        return 2 * size + 8 * -(-size // BLOCK)
    return 2 * wide * size
