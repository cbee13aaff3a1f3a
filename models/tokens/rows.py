"""Some tokens of a sequence: taken out, and put back.

Both directions save nothing but the index. `index_copy`'s own derivative would keep the rows it
wrote, which under checkpointing is as much as token sparsity gains.
"""

from typing import Any

import torch
from torch import Tensor

from mnemic.models.tokens.kernels import scatter_rows_


def take(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of `hidden` (B, S, ...): (B, K, ...). One sequence at a time: a gather
    by an index of all elements takes a CPU ten times as long.
    """
    if len(index) == 1:
        return hidden.index_select(1, index[0])
    found = hidden.new_empty(*index.shape, *hidden.shape[2:])
    for row, which in enumerate(index):
        torch.index_select(hidden[row], 0, which, out=found[row])
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = hidden.shape
        return take(hidden, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (index,) = grads, ctx.saved_tensors
        return scatter_rows_(grad.new_zeros(ctx.shape), index, grad.contiguous()), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        # `hidden` may be fp32 and rows bf16, or the other way round, under autocast.
        whole = hidden.to(torch.promote_types(hidden.dtype, rows.dtype), copy=True)
        ctx.dtypes = hidden.dtype, rows.dtype
        return scatter_rows_(whole, index, rows.to(whole.dtype).contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (index,) = grads, ctx.saved_tensors
        hidden_type, rows_type = ctx.dtypes
        dhidden = drows = None
        if ctx.needs_input_grad[2]:
            drows = take(grad, index).to(rows_type)
        if ctx.needs_input_grad[0]:
            dhidden = grad.to(hidden_type, copy=True)
            zeros = dhidden.new_zeros(*index.shape, grad.shape[-1])
            scatter_rows_(dhidden, index, zeros)
        return dhidden, None, drows


def gather_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """`take` for hidden states (B, S, H), with gradients."""
    return _Gather.apply(hidden, index)  # type: ignore[no-any-return]


def scatter_rows(hidden: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`hidden` (B, S, H) with rows `index` (B, K), distinct in each row, replaced by `rows`
    (B, K, H).
    """
    return _Scatter.apply(hidden, index, rows)  # type: ignore[no-any-return]


def cut_mask(mask: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask over the tokens of `index` (B, K): (B, S) -> (B, K), or (B or 1, h, S, S)
    -> (B or 1, h, K, K), then additive of `dtype`, which torch's sdpa would else make, and keep for
    the backward, in each layer anew.
    """
    if mask.ndim == 2:
        return mask.gather(1, index)
    shared = mask.shape[0] == 1 and (len(index) == 1 or bool((index == index[:1]).all()))
    parts = []
    for row in range(1 if shared else len(index)):
        own, which = mask[row if mask.shape[0] > 1 else 0], index[row]
        parts.append(own[:, which][:, :, which])
    found = torch.stack(parts)
    if found.dtype == torch.bool:
        low = torch.finfo(dtype).min
        found = torch.zeros_like(found, dtype=dtype).masked_fill_(~found, low)
    return found


def cut_angles(angles: Any, index: Tensor) -> Any:
    """Rotary (cos, sin), each (B or 1, S, d), at the original positions of `index` (B, K)."""
    shared = len(index) == 1
    return tuple(
        t[:, index[0]] if shared and t.shape[0] == 1
        else take(t.expand(len(index), *t.shape[1:]), index)
        for t in angles
    )  # fmt: skip


def recount(cumulative: Tensor, index: Tensor) -> tuple[Tensor, int]:
    """Flash attention's cumulative document lengths (n + 1,) int32 after only the tokens of `index`
    (1, K) are left, without documents that are left empty; and the longest.
    """
    ends = torch.searchsorted(index[0].contiguous(), cumulative.to(index.dtype))
    lengths = ends.diff()
    lengths = lengths[lengths > 0]
    found = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return found, int(lengths.max())


def documents(positions: Tensor) -> Tensor:
    """Cumulative lengths (n + 1,) int32 of the documents of one packed row, whose `positions`
    (1, S) begin at 0 in each.
    """
    starts = (positions[0] == 0).nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([positions.shape[1]])]).to(torch.int32)
