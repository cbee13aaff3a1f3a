"""Rows written back, or added, into the residual stream where it lies: no padded copy of them.

`index_copy` and `index_add` of torch save the rows for their backward, which for a layer that drops
half its tokens costs as much as checkpointing gains; these save the index alone. Adding sums equal
indices in a fixed order and in fp32 (`dispatch.runs`), where atomics would add in any order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mnemic.models.tokens.kernels.dispatch import (
    Backend,
    check_index,
    num_warps,
    power_of_two,
    runs,
    take_rows,
    triton_kernel,
    uses_triton,
)

if TYPE_CHECKING:
    import triton.language as tl


def scatter_rows_(
    hidden: Tensor, index: Tensor, rows: Tensor, *, backend: Backend = None
) -> Tensor:
    """hidden[b, index[b, k]] = rows[b, k], in place: `hidden` (B, S, H), `index` int64 (B, K),
    distinct within a row and in [0, S), `rows` (B, K, H) of hidden's dtype. Returns `hidden`,
    differentiable in both. ValueError for shapes or dtypes that do not fit.
    """
    _check(hidden, index, rows)
    return _Scatter.apply(hidden, index, rows, False, uses_triton(hidden, backend))  # type: ignore[return-value]


def scatter_add_rows_(
    hidden: Tensor, index: Tensor, rows: Tensor, *, backend: Backend = None
) -> Tensor:
    """hidden[b, index[b, k]] += rows[b, k], in place; as `scatter_rows_`, but equal indices add up.
    With Triton each sum is rounded once; torch rounds after every row.
    """
    _check(hidden, index, rows)
    return _Scatter.apply(hidden, index, rows, True, uses_triton(hidden, backend))  # type: ignore[return-value]


def reference_scatter_rows_(hidden: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`scatter_rows_` in torch, on any device."""
    return scatter_rows_(hidden, index, rows, backend="torch")


def reference_scatter_add_rows_(hidden: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`scatter_add_rows_` in torch, on any device."""
    return scatter_add_rows_(hidden, index, rows, backend="torch")


def _check(hidden: Tensor, index: Tensor, rows: Tensor) -> None:
    check_index(hidden, index)
    expected = (*index.shape, hidden.shape[2])
    if rows.shape != expected or rows.dtype != hidden.dtype:
        raise ValueError(
            f"rows must be {expected} of {hidden.dtype}, found {tuple(rows.shape)} of {rows.dtype}"
        )


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, index: Tensor, rows: Tensor, add: bool, triton: bool
    ) -> Tensor:
        if triton:
            (_triton_add if add else _triton_write)(hidden, index, rows)
        else:
            for stream, at, source in zip(hidden, index, rows, strict=True):
                (stream.index_add_ if add else stream.index_copy_)(0, at, source)
        ctx.mark_dirty(hidden)
        ctx.save_for_backward(index)
        ctx.add = add
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        grad_hidden = grad_rows = None
        if ctx.needs_input_grad[0]:
            # What was overwritten has no gradient. `grad` may be shared, so never in place.
            grad_hidden = grad if ctx.add else _without(grad, index)
        if ctx.needs_input_grad[2]:
            grad_rows = take_rows(grad, index)
        return grad_hidden, None, grad_rows, None, None


def _without(grad: Tensor, index: Tensor) -> Tensor:
    left = grad.clone()
    for stream, at in zip(left, index, strict=True):
        stream.index_fill_(0, at, 0.0)
    return left


def _triton_write(hidden: Tensor, index: Tensor, rows: Tensor) -> None:
    (batch, kept), (_, length, width) = index.shape, hidden.shape
    block = power_of_two(width)
    _write_kernel.launch(
        (batch * kept,), hidden, index.contiguous(), rows, *hidden.stride(), *rows.stride(),
        length, kept, width, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip


def _triton_add(hidden: Tensor, index: Tensor, rows: Tensor) -> None:
    (batch, kept), (_, length, width) = index.shape, hidden.shape
    block = power_of_two(width)
    _add_kernel.launch(
        (batch * kept,), hidden, *runs(index), rows, *hidden.stride(), *rows.stride(),
        length, kept, width, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip


@triton_kernel
def _write_kernel(
    hidden, index, rows,
    batch_stride, row_stride, column_stride, from_batch, from_row, from_column,
    length, kept, width, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    target = tl.load(index + at)
    tl.device_assert((target >= 0) & (target < length), "index outside the sequence")
    source = rows + at // kept * from_batch + at % kept * from_row
    place = hidden + at // kept * batch_stride + target * row_stride + columns * column_stride
    tl.store(place, tl.load(source + columns * from_column, mask=inside), mask=inside)


@triton_kernel
def _add_kernel(
    hidden, ordered, order, rows,
    batch_stride, row_stride, column_stride, from_batch, from_row, from_column,
    length, kept, width, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    batch = at // kept
    columns = tl.arange(0, BLOCK)
    target = tl.load(ordered + at)
    tl.device_assert((target >= 0) & (target < length), "index outside the sequence")
    before = tl.load(ordered + at - 1, mask=at % kept > 0, other=-1)
    # The first of equal indices walks them all; the others find nothing to do.
    more = target != before
    inside = columns < tl.where(more, width, 0)
    place = hidden + batch * batch_stride + target * row_stride + columns * column_stride
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    while more:
        source = rows + batch * from_batch + tl.load(order + at) * from_row
        total += tl.load(source + columns * from_column, mask=inside, other=0.0).to(tl.float32)
        at += 1
        same = tl.load(ordered + at, mask=at % kept > 0, other=-1)
        more = same == target
    tl.store(place, total.to(hidden.dtype.element_ty), mask=inside)
