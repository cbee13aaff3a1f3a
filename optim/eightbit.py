"""Adam's moments in one byte each, in blocks (after Dettmers et al., arXiv 2110.02861).

A block of 256 elements has one fp32 scale, its largest magnitude. Codes are companded: a moment is
scale * (code / 127)^3 with a sign, a second moment scale * (code / 255)^4, so small values keep
a relative resolution that linear codes lose. A second moment above zero never becomes zero, which
would make its element's step explode: its code is rounded up. Elementwise arithmetic only: any
device, no table.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 256


def zeros(param: Tensor) -> dict[str, Tensor]:
    """State for `param` (any shape): two bytes an element and two fp32 scales a block."""
    size, blocks = param.numel(), -(-param.numel() // BLOCK)
    device = param.device
    return {
        "exp_avg": torch.zeros(size, dtype=torch.int8, device=device),
        "exp_avg_sq": torch.zeros(size, dtype=torch.uint8, device=device),
        "exp_avg_scale": torch.zeros(blocks, dtype=torch.float32, device=device),
        "exp_avg_sq_scale": torch.zeros(blocks, dtype=torch.float32, device=device),
    }


def _blocks(flat: slice) -> slice:
    return slice(flat.start // BLOCK, -(-flat.stop // BLOCK))


def _padded(x: Tensor) -> Tensor:
    short = -x.numel() % BLOCK
    return torch.nn.functional.pad(x, (0, short)).view(-1, BLOCK)


def dequantize(state: dict[str, Any], flat: slice) -> tuple[Tensor, Tensor]:
    """Both moments of the elements `flat` (starting at a block), fp32."""
    size, blocks = flat.stop - flat.start, _blocks(flat)
    code = _padded(state["exp_avg"][flat].float().div_(127))
    exp_avg = (code * code).mul_(code).mul_(state["exp_avg_scale"][blocks, None])
    code = _padded(state["exp_avg_sq"][flat].float().div_(255)).square_().square_()
    exp_avg_sq = code.mul_(state["exp_avg_sq_scale"][blocks, None])
    return exp_avg.view(-1)[:size], exp_avg_sq.view(-1)[:size]


def quantize(state: dict[str, Any], flat: slice, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Put fp32 moments of the elements `flat` back."""
    size, blocks = flat.stop - flat.start, _blocks(flat)
    for name, value, top in (("exp_avg", exp_avg, 127), ("exp_avg_sq", exp_avg_sq, 255)):
        value = _padded(value)
        scale = value.abs().amax(1)
        unit = value / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        if name == "exp_avg":
            code = unit.abs().pow_(1 / 3).mul_(unit.sign()).mul_(top).round_()
        else:
            code = unit.sqrt_().sqrt_().mul_(top).ceil_()
        state[name][flat] = code.view(-1)[:size].to(state[name].dtype)
        state[f"{name}_scale"][blocks] = scale
