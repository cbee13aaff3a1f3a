"""The mathematics of one APOLLO step (arXiv 2412.05270, Alg. 1), on plain tensors.

With G the gradient of W (..., m, n), R its projection and R~ = M / (sqrt(V) + eps) the Adam
direction of R, a channel j (a row where m >= n, else a column) is scaled by s_j = ||R~_j|| /
||R_j||, or the whole matrix by ||R~|| / ||R||. The limiter needs ||G S||, which follows from the
channel norms of G; so scale, limiter, bias correction and learning rate become one factor for each
channel, and W is changed in one pass. Of weight size are only: G read twice, W read and written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

# Rows of one block when squares are summed down the columns: the running sum stays in cache.
_BLOCK = 32

ScaleType = Literal["channel", "tensor"]


@dataclass(frozen=True)
class Layout:
    """How a weight of `shape` is projected: a matrix, or a stack of them (experts)."""

    shape: tuple[int, ...]
    rank: int
    scale_type: ScaleType

    @property
    def side(self) -> str:
        """Which axis is projected: "right" the columns (rows are channels), "left" the rows."""
        return "right" if self.shape[-2] >= self.shape[-1] else "left"

    @property
    def reduce(self) -> tuple[int, ...]:
        """Axes over which the norm of one scale is taken."""
        if self.scale_type == "tensor":
            return (-2, -1)
        return (-1,) if self.side == "right" else (-2,)

    def low_shape(self, local: Sequence[int]) -> list[int]:
        """Shape of R for a gradient, or a shard of one, of shape `local`."""
        low = [*local]
        low[-1 if self.side == "right" else -2] = self.rank
        return low

    @property
    def low_size(self) -> int:
        """Elements of R of one matrix."""
        return max(self.shape[-2:]) * self.rank


def square_sums(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sums of squares of `x` over `axes`, which stay as 1: fp32 (fp64 for fp64), one pass."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    if axes != (-2,) and x.dtype == torch.bfloat16:
        # The kernel sums in fp32 but is twice as fast when it may return bf16: so row by row, where
        # the roundings of many rows average out.
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True).to(exact).square_()
        return rows if axes == (-1,) else rows.sum(-2, keepdim=True)
    if axes != (-2,):
        return torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=exact).square_()
    # A norm down the columns is 20 to 60 times slower here than adding up blocks of rows.
    shape = [*x.shape]
    shape[-2] = min(_BLOCK, shape[-2])
    total = x.new_zeros(shape, dtype=exact)
    for block in x.split(_BLOCK, dim=-2):
        block = block.to(exact)
        total[..., : block.shape[-2], :].addcmul_(block, block)
    return total.sum(-2, keepdim=True)


def adam_direction_(
    lows: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    betas: tuple[float, float], eps: float, step: int | None = None,
) -> None:  # fmt: skip
    """Update the moments with `lows` and overwrite those with minus Adam's direction, with its bias
    corrections at `step` (from 1) or, without one, -M / (sqrt(V) + eps).

    One fused kernel for all: torch's AdamW with learning rate 1 and weight decay 1, on a parameter
    that is its own gradient (each element is read before it is written): p - p - direction.
    """
    # The kernel adds 1 to its step number; from a very large one the corrections are 1.
    count = 2.0**100 if step is None else step - 1
    steps = [torch.full((), count, dtype=torch.float32, device=x.device) for x in lows]
    fused_adamw(
        lows, lows, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, maximize=False,
        beta1=betas[0], beta2=betas[1], lr=1.0, weight_decay=1.0, eps=eps,
    )  # fmt: skip


def bias_correction(step: int, betas: tuple[float, float]) -> float:
    """Adam's correction of both moments, as a factor of the learning rate."""
    return (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
