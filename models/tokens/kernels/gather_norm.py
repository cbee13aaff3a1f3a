"""Kept rows and their RMSNorm in one pass, without the permuted copy in between.

Computes what `LlamaRMSNorm(hidden[b, index[b]])` of transformers does: fp32 inside, rounded to the
input's dtype, then times the weight. For the backward it keeps the index, the gathered rows (which
the caller holds anyway, as the residual) and one fp32 number a row; autograd of the plain formula
keeps all of `hidden`, an fp32 copy of the rows and their normalised copy. An index may occur twice.
tests/models/tokens/test_kernels.py compares both backends with that formula.
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

# Programs that share the rows where the weight needs a gradient: each keeps one fp32 partial sum.
_PARTS = 256


def gather_rms_norm(
    hidden: Tensor, index: Tensor, weight: Tensor, eps: float, *, backend: Backend = None
) -> tuple[Tensor, Tensor]:
    """`hidden` (B, S, H), `index` int64 (B, K) of positions in [0, S), `weight` (H,). Returns the
    rows (B, K, H) in hidden's dtype and their RMSNorm (B, K, H) in that of `weight * hidden`.
    Differentiable once, in hidden and weight. ValueError for shapes that do not fit; an index
    outside [0, S) is found by the torch backend, by Triton only under TRITON_DEBUG=1.
    """
    check_index(hidden, index)
    if weight.shape != hidden.shape[2:]:
        raise ValueError(f"weight must be ({hidden.shape[2]},), found {tuple(weight.shape)}")
    return _GatherNorm.apply(hidden, index, weight, eps, uses_triton(hidden, backend))  # type: ignore[return-value]


def reference_gather_rms_norm(
    hidden: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`gather_rms_norm` in torch, on any device."""
    return gather_rms_norm(hidden, index, weight, eps, backend="torch")


class _GatherNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, index: Tensor, weight: Tensor, eps: float, triton: bool
    ) -> tuple[Tensor, Tensor]:
        step = _triton_forward if triton else _torch_forward
        rows, normed, rstd = step(hidden, index, weight, eps)
        ctx.save_for_backward(index, rows, weight, rstd)
        ctx.length, ctx.triton = hidden.shape[1], triton
        return rows, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_normed: Tensor) -> tuple[Tensor | None, ...]:
        index, rows, weight, rstd = ctx.saved_tensors
        step = _triton_backward if ctx.triton else _torch_backward
        grad_hidden = rows.new_zeros(rows.shape[0], ctx.length, rows.shape[2])
        train_weight = ctx.needs_input_grad[2]
        grad_weight = step(
            grad_rows, grad_normed, rows, rstd, weight, index, grad_hidden, train_weight
        )
        return grad_hidden, None, grad_weight, None, None


def _torch_forward(
    hidden: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = take_rows(hidden, index)
    exact = rows.float()
    rstd = torch.rsqrt(exact.square().mean(-1) + eps)
    return rows, weight * (exact * rstd[..., None]).to(rows.dtype), rstd


def _torch_backward(
    grad_rows: Tensor,
    grad_normed: Tensor,
    rows: Tensor,
    rstd: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_hidden: Tensor,
    train_weight: bool,
) -> Tensor | None:
    unit = rows.float() * rstd[..., None]
    upstream = grad_normed.float()
    grad_weight = None
    if train_weight:
        grad_weight = (upstream * unit.to(rows.dtype)).sum((0, 1)).to(weight.dtype)
    upstream = upstream * weight.float()
    upstream -= unit * (upstream * unit).mean(-1, keepdim=True)
    upstream *= rstd[..., None]
    upstream += grad_rows
    for into, at, grad in zip(grad_hidden, index, upstream.to(rows.dtype), strict=True):
        into.index_add_(0, at, grad)
    return grad_weight


def _triton_forward(
    hidden: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, width), kept = hidden.shape, index.shape[1]
    rows = hidden.new_empty(batch, kept, width)
    normed = torch.empty_like(rows, dtype=torch.promote_types(hidden.dtype, weight.dtype))
    rstd = hidden.new_empty(batch, kept, dtype=torch.float32)
    block = power_of_two(width)
    _forward_kernel.launch(
        (batch * kept,), hidden, index.contiguous(), weight.contiguous(), rows, normed, rstd,
        *hidden.stride(), length, kept, width, eps, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip
    return rows, normed, rstd


def _triton_backward(
    grad_rows: Tensor,
    grad_normed: Tensor,
    rows: Tensor,
    rstd: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_hidden: Tensor,
    train_weight: bool,
) -> Tensor | None:
    (_, length, width), (batch, kept) = grad_hidden.shape, index.shape
    total = batch * kept
    programs = min(total, _PARTS) if train_weight else total
    parts = rows.new_empty(programs if train_weight else 0, width, dtype=torch.float32)
    block = power_of_two(width)
    _backward_kernel.launch(
        (programs,), grad_rows.contiguous(), grad_normed.contiguous(), rows, rstd,
        weight.contiguous(), *runs(index), grad_hidden, parts, length, kept, width, total, programs,
        TRAIN_WEIGHT=train_weight, BLOCK=block, num_warps=num_warps(block),
    )  # fmt: skip
    return parts.sum(0).to(weight.dtype) if train_weight else None


@triton_kernel
def _forward_kernel(
    hidden, index, weight, rows, normed, rstd,
    batch_stride, row_stride, column_stride, length, kept, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # 64 bits: a batch of long sequences has more than 2^31 elements.
    at = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    source = tl.load(index + at)
    tl.device_assert((source >= 0) & (source < length), "index outside the sequence")
    start = hidden + at // kept * batch_stride + source * row_stride
    row = tl.load(start + columns * column_stride, mask=inside, other=0.0)
    exact = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / width + eps)
    # As transformers does: rounded to the input's dtype before the weight.
    unit = (exact * scale).to(row.dtype).to(tl.float32)
    by = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(rows + at * width + columns, row, mask=inside)
    tl.store(normed + at * width + columns, (by * unit).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + at, scale)


@triton_kernel
def _backward_kernel(
    grad_rows, grad_normed, rows, rstd, weight, ordered, order, grad_hidden, parts,
    length, kept, width, total, programs,
    TRAIN_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    by = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for first in range(program, total, programs):
        batch = first // kept
        target = tl.load(ordered + first)
        before = tl.load(ordered + first - 1, mask=first % kept > 0, other=-1)
        grad = tl.zeros((BLOCK,), tl.float32)
        at = first
        # The first of equal indices walks them all; the others find nothing to do.
        more = target != before
        while more:
            here = batch * kept + tl.load(order + at)
            scale = tl.load(rstd + here)
            row = tl.load(rows + here * width + columns, mask=inside, other=0.0)
            unit = row.to(tl.float32) * scale
            upstream = tl.load(grad_normed + here * width + columns, mask=inside, other=0.0)
            upstream = upstream.to(tl.float32)
            if TRAIN_WEIGHT:
                grad_weight += upstream * unit.to(row.dtype).to(tl.float32)
            upstream *= by
            upstream = scale * (upstream - unit * (tl.sum(upstream * unit, 0) / width))
            past = tl.load(grad_rows + here * width + columns, mask=inside, other=0.0)
            grad += upstream + past.to(tl.float32)
            at += 1
            same = tl.load(ordered + at, mask=at % kept > 0, other=-1)
            more = same == target
        store = columns < tl.where(target != before, width, 0)
        place = grad_hidden + (batch * length + target) * width + columns
        tl.store(place, grad.to(grad_hidden.dtype.element_ty), mask=store)
    if TRAIN_WEIGHT:
        tl.store(parts + program * width + columns, grad_weight, mask=inside)
