"""The one pass that changes a weight: W = keep * W + f * G, and rounding to bf16.

Stochastic rounding (Gupta et al., arXiv 1502.02551) rounds up with a probability equal to the part
that is cut off, so updates below half a unit in the last place are kept in expectation; rounding to
nearest loses every one of them. The noise of element (i, j) is `row[i] xor col[j]`, two streams of
16-bit numbers drawn anew for each tensor and step. Each element's noise is uniform and any two are
independent, so mean and variance of every sum of rounding errors are those of independent noise,
for m + n random numbers in place of m * n; and a shard draws only its own rows.
"""

from collections.abc import Callable
from functools import cache
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mnemic.optim.int8 import Int8Weight
from mnemic.optim.random import lanes

# Elements changed at a time on a CPU: weight, gradient and fp32 scratch of a chunk stay in cache.
_CHUNK = 1 << 18

Noise = tuple[Tensor, Tensor]


def rounding_noise(key: int, weight: Tensor, first_row: int = 0) -> Noise:
    """Noise for `weight` (..., m, n), whose rows begin at `first_row` of the whole tensor: int32
    (rows, 1) and (n,), rows counted over all leading dimensions.
    """
    cols = weight.shape[-1]
    rows = weight.numel() // max(1, cols)
    # Two streams apart: no tensor has 2^40 columns.
    return (
        lanes(key, (1 << 40) + first_row, rows, weight.device)[:, None],
        lanes(key, 0, cols, weight.device),
    )


def round_to_bf16_(target: Tensor, exact: Tensor, row: Tensor, col: Tensor) -> None:
    """Write fp32 `exact` (destroyed) into bf16 `target`, rounding stochastically."""
    # bf16 is the upper half of fp32: a carry out of the lower half is the rounding up, and sign and
    # magnitude being apart makes it right for both signs.
    bits = exact.view(torch.int32).add_(row ^ col).bitwise_right_shift_(16)
    target.view(torch.int16).copy_(bits)


@cache
def _scratch(name: str, dtype: torch.dtype, thread: int) -> Tensor:
    """Lasting memory for a chunk: a fresh temporary each time costs its page faults again."""
    del name, thread
    return torch.empty(2 * _CHUNK, dtype=dtype)


def _chunk_of(name: str, dtype: torch.dtype, like: Tensor) -> Tensor:
    size = like.numel()
    if like.device.type != "cpu" or size > 2 * _CHUNK:
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return _scratch(name, dtype, get_ident())[:size].view(like.shape)


def norm_fp32(x: Tensor) -> Tensor:
    """The 2-norm of `x`, summed in fp32 without an fp32 copy of a narrower `x`."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.linalg.vector_norm(x)
    parts = x.reshape(-1).split(_CHUNK) if x.device.type == "cpu" else (x,)
    norms = [torch.linalg.vector_norm(_chunk_of("a", torch.float32, p).copy_(p)) for p in parts]
    return torch.linalg.vector_norm(torch.stack(norms))


def _write_chunk(
    weight: Tensor, grad: Tensor, factor: Tensor, keep: float | None,
    row: Tensor | None, col: Tensor | None,
) -> None:  # fmt: skip
    """`_write` for narrow weights on a CPU, without temporaries."""
    exact = _chunk_of("a", torch.float32, weight).copy_(weight)
    if keep is not None:
        exact.mul_(keep)
    exact.addcmul_(_chunk_of("b", torch.float32, grad).copy_(grad), factor)
    if row is None or col is None:
        weight.copy_(exact)
        return
    noise = torch.bitwise_xor(row, col, out=_chunk_of("c", torch.int32, weight))
    bits = exact.view(torch.int32).add_(noise).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(bits)


def _write(
    weight: Tensor, grad: Tensor, factor: Tensor, keep: Tensor | float | None,
    row: Tensor | None, col: Tensor | None,
) -> None:  # fmt: skip
    if weight.dtype in (torch.float32, torch.float64):
        if keep is not None:
            weight.mul_(keep)
        weight.addcmul_(grad, factor)
        return
    exact = weight.float()
    if keep is not None:
        exact.mul_(keep)
    exact.addcmul_(grad.float(), factor)
    if row is None or col is None:
        weight.copy_(exact)
    else:
        round_to_bf16_(weight, exact, row, col)


@cache
def _compiled(*variant: Any) -> Callable[..., None]:
    """A compiled `_write` for one shape, dtype and way of rounding: static, so that none of it is
    compiled twice or guarded by more than it needs.
    """
    del variant
    # torch keeps at most 8 variants of one code object: each has a copy of its own.
    own = FunctionType(_write.__code__.replace(), globals())
    return torch.compile(own, dynamic=False, fullgraph=True)


def write(
    weight: Tensor,
    grad: Tensor,
    factor: Tensor,
    keep: float = 1.0,
    noise: Noise | None = None,
    compiled: bool = False,
) -> None:
    """In place: `weight = keep * weight + factor * grad`.

    `factor` has the weight's number of dimensions, each of size 1 or the weight's; fp32 (fp64 for
    fp64), the sign of the step included. Weights below fp32 are computed in fp32 and rounded:
    stochastically with `noise` (bf16 and Int8Weight only), else to nearest.
    """
    if weight.numel() == 0:
        return
    if isinstance(weight, Int8Weight):
        weight.update_(grad, factor, keep, noise)
        return
    row, col = noise or (None, None)
    if row is not None:
        row = row.view(*weight.shape[:-1], 1)
    if compiled:
        rate = torch.full((), keep, dtype=factor.dtype, device=weight.device)
        variant = weight.shape, weight.dtype, grad.dtype, factor.shape, row is None, weight.device
        _compiled(*variant)(weight, grad, factor, rate, row, col)
        return
    kept = None if keep == 1.0 else keep
    on_cpu = weight.device.type == "cpu"
    if on_cpu and kept is None and noise is None and factor.numel() == 1:
        # alpha stays fp32 inside the kernel for weights of any dtype.
        weight.add_(grad, alpha=factor.item())
        return
    length = weight.shape[0]
    step = max(1, _CHUNK * length // weight.numel()) if on_cpu else length
    for first in range(0, length, step):
        part = slice(first, first + step)
        narrow = on_cpu and weight.dtype not in (torch.float32, torch.float64)
        (_write_chunk if narrow else _write)(
            weight[part], grad[part], factor if factor.shape[0] == 1 else factor[part], kept,
            None if row is None else row[part], col,
        )  # fmt: skip
