"""Sums over consecutive segments of a flat tensor: one loss a document, from one loss a token.

A Triton program walks its own segment, a loop whose length is data; no padding to the longest, and
no wait for the device. The backward spreads each segment's gradient over its values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemic.models.tokens.kernels.dispatch import (
    Backend,
    num_warps,
    triton_kernel,
    uses_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

_BLOCK = 1024


def segment_sums(values: Tensor, offsets: Tensor, *, backend: Backend = None) -> Tensor:
    """`values` fp32 (N,), `offsets` int64 (M + 1,), not decreasing, in [0, N]. Returns fp32 (M,):
    sums of values[offsets[m] : offsets[m + 1]], 0 where that is empty. Values before the first or
    after the last offset are in no sum. Differentiable once in the values. ValueError for shapes or
    dtypes that do not fit.
    """
    if values.dim() != 1 or values.dtype != torch.float32:
        raise ValueError(f"values must be fp32 (N,), found {values.dtype} {tuple(values.shape)}")
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype != torch.int64:
        raise ValueError(
            f"offsets must be int64 (M + 1,), found {offsets.dtype} {tuple(offsets.shape)}"
        )
    return _SegmentSums.apply(values, offsets, uses_triton(values, backend))  # type: ignore[return-value]


def reference_segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """`segment_sums` in torch, on any device."""
    return segment_sums(values, offsets, backend="torch")


def _owners(count: int, offsets: Tensor) -> Tensor:
    """int64 (count,): 1 + the segment of each value; 0 before the first, M + 1 after the last."""
    return torch.searchsorted(offsets, torch.arange(count, device=offsets.device), right=True)


class _SegmentSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, triton: bool) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.count = len(values)
        if not triton:
            sums = values.new_zeros(len(offsets) + 1)
            return sums.index_add_(0, _owners(len(values), offsets), values)[1:-1].clone()
        sums = values.new_empty(len(offsets) - 1)
        _sum_kernel.launch(
            (len(sums),), values.contiguous(), offsets.contiguous(), sums,
            BLOCK=_BLOCK, num_warps=num_warps(_BLOCK),
        )  # fmt: skip
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        padded = torch.nn.functional.pad(grad, (1, 1))
        return padded[_owners(ctx.count, offsets)], None, None


@triton_kernel
def _sum_kernel(values, offsets, sums, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    last = tl.load(offsets + segment + 1)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(offsets + segment), last, BLOCK):
        at = first + lanes
        total += tl.load(values + at, mask=at < last, other=0.0)
    tl.store(sums + segment, tl.sum(total, 0))
