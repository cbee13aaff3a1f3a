"""LeMo's block scores: how much blocks of tokens attend to each other, in memory O(S).

A[i, j] = max over u in block i, v in block j of sum over heads of ReLU(q_u . k_v * scale)
(LeMo, arXiv 2501.09767; the authors' code has the same formula, with and without the scale and the
causal mask). The importance of block j is a sum over i, the caller's choice. FLOPs stay O(S^2), but
nothing larger than a stripe of `block` queries against all keys is ever held.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mnemic.models.tokens.kernels.dispatch import Backend, power_of_two, triton_kernel, uses_triton

if TYPE_CHECKING:
    import triton.language as tl

# A program holds block x block fp32 scores in registers, which spill past 128, and a block of
# queries and one of keys in shared memory, of which cards since Ampere give it 99 KiB or more.
_LARGEST_BLOCK = 128
_SHARED_BYTES = 1 << 16


def block_scores(
    q: Tensor, k: Tensor, *, block: int = 64, scale: float, causal: bool, backend: Backend = None
) -> Tensor:
    """`q` (B, Hq, S, D) and `k` (B, Hkv, S, D) of one floating dtype, Hq a multiple of Hkv (query
    head h reads key head h // (Hq / Hkv)). Returns fp32 (B, nb, nb) with nb = ceil(S / block), no
    gradient; under `causal` keys after the query do not count, and a block with none left is 0.
    Blocks too large for a Triton program (above 128, or fp32 of 128 x 128) are computed by torch on
    every device. ValueError for shapes that do not fit.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q must be (B, Hq, S, D) and k (B, Hkv, S, D), found {tuple(q.shape)} "
            f"and {tuple(k.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}: give both one dtype")
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    q, k = q.detach(), k.detach()
    # tl.dot wants powers of two of at least 16.
    padded, depth = power_of_two(block, 16), power_of_two(q.shape[3], 16)
    fits = padded <= _LARGEST_BLOCK and 2 * padded * depth * q.element_size() <= _SHARED_BYTES
    if uses_triton(q, backend) and fits:
        return _triton(q, k, block, scale, causal, padded, depth)
    return reference_block_scores(q, k, block=block, scale=scale, causal=causal)


@torch.no_grad()
def reference_block_scores(
    q: Tensor, k: Tensor, *, block: int = 64, scale: float, causal: bool
) -> Tensor:
    """`block_scores` in torch, a stripe of queries at a time: fp32 (B, Hq, block, S) at most, and
    an fp32 copy of `k`.
    """
    (batch, heads, length, width), shared = q.shape, k.shape[1]
    count = -(-length // block)
    scores = q.new_zeros(batch, count, count, dtype=torch.float32)
    keys = k.float().transpose(2, 3)
    positions = torch.arange(length, device=q.device)
    for i in range(count):
        first, last = i * block, min((i + 1) * block, length)
        seen = last if causal else length
        # Query heads that share a key head become rows of one product.
        stripe = q[:, :, first:last].float().reshape(batch, shared, -1, width)
        pairs = (stripe @ keys[..., :seen]).mul_(scale).relu_()
        pairs = pairs.view(batch, heads, last - first, seen).sum(1)
        if causal:
            pairs.masked_fill_(positions[:seen] > positions[first:last, None], 0.0)
        # No score is below 0, so the zeros that fill the last block change no maximum.
        best = pairs.amax(1)
        best = torch.nn.functional.pad(best, (0, -seen % block))
        best = best.view(batch, -1, block).amax(2)
        scores[:, i, : best.shape[1]] = best
    return scores


def _triton(
    q: Tensor, k: Tensor, block: int, scale: float, causal: bool, padded: int, depth: int
) -> Tensor:
    (batch, heads, length, width), shared = q.shape, k.shape[1]
    count = -(-length // block)
    scores = q.new_zeros(batch, count, count, dtype=torch.float32)
    _score_kernel.launch(
        (count, count, batch), q, k, scores, *q.stride(), *k.stride(), heads // shared, shared,
        length, width, count, block, scale, CAUSAL=causal, BLOCK=padded, DEPTH=depth,
        num_warps=4 if padded <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return scores


@triton_kernel
def _score_kernel(
    q, k, scores,
    q_batch, q_head, q_row, q_column, k_batch, k_head, k_row, k_column,
    group, shared, length, width, count, block, scale,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    if CAUSAL:  # noqa: SIM102  # apart, so that the compiler drops the branch where it is False
        if j > i:
            return
    lanes = tl.arange(0, BLOCK)
    columns = tl.arange(0, DEPTH)
    queries = i * block + lanes
    keys = j * block + lanes
    # Rows past the end are read as 0 and score 0, which is below no maximum.
    q_inside = ((lanes < block) & (queries < length))[:, None] & (columns < width)[None, :]
    k_inside = ((lanes < block) & (keys < length))[:, None] & (columns < width)[None, :]
    q_start = q + batch * q_batch + queries[:, None] * q_row + columns[None, :] * q_column
    k_start = k + batch * k_batch + keys[:, None] * k_row + columns[None, :] * k_column
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for head in range(shared):
        key = tl.trans(tl.load(k_start + head * k_head, mask=k_inside, other=0.0))
        for member in range(group):
            place = q_start + (head * group + member) * q_head
            query = tl.load(place, mask=q_inside, other=0.0)
            # "ieee": fp32 inputs would be cut to TF32 otherwise; others do not notice.
            total += tl.maximum(tl.dot(query, key, input_precision="ieee") * scale, 0.0)
    if CAUSAL:
        total = tl.where(keys[None, :] > queries[:, None], 0.0, total)
    tl.store(scores + (batch * count + i) * count + j, tl.max(tl.max(total, 1), 0))
