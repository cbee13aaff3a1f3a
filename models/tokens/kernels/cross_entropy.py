"""Cross-entropy of each row, from logits in their own dtype: no fp32 copy, no saved softmax.

The forward keeps the logits and one fp32 log-sum-exp a row (online softmax, Milakov and Gimelshein,
arXiv 1805.02867); the backward recomputes softmax - onehot from them. Per-row losses let the caller
weigh tokens or average by document (`segments.py`) and divide by a global count. An ignored row has
loss 0 and gradient 0 whatever its logits hold, NaN included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemic.models.tokens.kernels.dispatch import (
    Backend,
    num_warps,
    power_of_two,
    triton_kernel,
    uses_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

# Elements of the logits that torch holds in fp32 at a time.
_CHUNK = 1 << 22
# Elements a Triton program reads at a time.
_BLOCK = 4096


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, *, backend: Backend = None
) -> Tensor:
    """`logits` (N, V) of any floating dtype, `targets` int64 (N,) in [0, V) or `ignore_index`.
    Returns fp32 (N,), differentiable once in the logits (gradient in their dtype). ValueError for
    shapes that do not fit; a target outside is found by torch, by Triton only under TRITON_DEBUG=1.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"logits must be (N, V) and targets int64 (N,), found {tuple(logits.shape)} and "
            f"{targets.dtype} {tuple(targets.shape)}"
        )
    triton = uses_triton(logits, backend)
    return _CrossEntropy.apply(logits, targets, ignore_index, triton)  # type: ignore[return-value]


def reference_cross_entropy_rows(
    logits: Tensor, targets: Tensor, ignore_index: int = -100
) -> Tensor:
    """`cross_entropy_rows` in torch, a chunk of rows at a time, on any device."""
    return cross_entropy_rows(logits, targets, ignore_index, backend="torch")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, ignore_index: int, triton: bool
    ) -> Tensor:
        step = _triton_forward if triton else _torch_forward
        losses, log_sums = step(logits, targets, ignore_index)
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.ignore_index, ctx.triton = ignore_index, triton
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        step = _triton_backward if ctx.triton else _torch_backward
        logits, targets, log_sums = ctx.saved_tensors
        found = step(logits, targets, log_sums, grad, ctx.ignore_index)
        return found, None, None, None


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]


def _torch_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    ignored = targets == ignore_index
    log_sums = logits.new_empty(targets.shape, dtype=torch.float32)
    for part in _chunks(logits):
        log_sums[part] = logits[part].float().logsumexp(1)
    chosen = logits.gather(1, targets.masked_fill(ignored, 0)[:, None])[:, 0]
    return (log_sums - chosen.float()).masked_fill_(ignored, 0.0), log_sums


def _torch_backward(
    logits: Tensor, targets: Tensor, log_sums: Tensor, grad: Tensor, ignore_index: int
) -> Tensor:
    ignored = (targets == ignore_index)[:, None]
    chosen = targets[:, None].masked_fill(ignored, 0)
    minus_one = log_sums.new_full((1, 1), -1.0)
    found = torch.empty_like(logits)
    for part in _chunks(logits):
        # Of fp32 logits, float() is no copy: nothing in place before one is made.
        exact = (logits[part].float() - log_sums[part, None]).exp_()
        exact.scatter_add_(1, chosen[part], minus_one.expand(len(exact), 1))
        found[part] = exact.mul_(grad[part, None]).masked_fill_(ignored[part], 0.0)
    return found


def _triton_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    count, width = logits.shape
    losses = logits.new_empty(count, dtype=torch.float32)
    log_sums = torch.empty_like(losses)
    block = min(_BLOCK, power_of_two(width))
    _forward_kernel.launch(
        (count,), logits, targets.contiguous(), losses, log_sums, *logits.stride(), width,
        ignore_index, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip
    return losses, log_sums


def _triton_backward(
    logits: Tensor, targets: Tensor, log_sums: Tensor, grad: Tensor, ignore_index: int
) -> Tensor:
    count, width = logits.shape
    found = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block = min(_BLOCK, power_of_two(width))
    _backward_kernel.launch(
        (count, -(-width // block)), logits, targets.contiguous(), log_sums, grad.contiguous(),
        found, *logits.stride(), width, ignore_index, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip
    return found


@triton_kernel
def _forward_kernel(
    logits, targets, losses, log_sums, row_stride, column_stride, width, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # 64 bits: 64K rows of a 128K vocabulary are more than 2^31 elements.
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * row_stride
    target = tl.load(targets + at)
    lanes = tl.arange(0, BLOCK)
    highest = float("-inf")
    total = 0.0
    for first in range(0, width, BLOCK):
        columns = first + lanes
        inside = columns < width
        found = tl.load(row + columns * column_stride, mask=inside, other=float("-inf"))
        found = found.to(tl.float32)
        peak = tl.maximum(highest, tl.max(found, 0))
        # A block that is -inf throughout (a padded vocabulary) must not become inf - inf.
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(found - shift), 0)
        highest = peak
    log_sum = highest + tl.log(total)
    used = target != ignore_index
    valid = (target >= 0) & (target < width)
    tl.device_assert(valid | (target == ignore_index), "target outside the vocabulary")
    chosen = tl.load(row + target * column_stride, mask=used & valid, other=0.0).to(tl.float32)
    tl.store(log_sums + at, log_sum)
    tl.store(losses + at, tl.where(used, log_sum - chosen, 0.0))


@triton_kernel
def _backward_kernel(
    logits, targets, log_sums, grad, grad_logits, row_stride, column_stride, width, ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    target = tl.load(targets + at)
    found = tl.load(logits + at * row_stride + columns * column_stride, mask=inside, other=0.0)
    soft = tl.exp(found.to(tl.float32) - tl.load(log_sums + at))
    soft = (soft - tl.where(columns == target, 1.0, 0.0)) * tl.load(grad + at)
    # A choice, not a product: 0 times the NaN of an ignored row would be NaN.
    soft = tl.where(target == ignore_index, 0.0, soft)
    place = grad_logits + at * width + columns
    tl.store(place, soft.to(grad_logits.dtype.element_ty), mask=inside)
