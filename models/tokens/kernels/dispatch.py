"""Whether a tensor goes to Triton or to torch, and Triton kernels that compile at first launch.

A kernel file must be importable where triton is absent, and a process that never launches a kernel
should not pay for its import. So `triton_kernel` keeps the plain function; the first launch imports
triton, puts `tl` into the function's module (where both the compiler and the interpreter look names
up), and compiles.

Without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET=1 in the environment before
anything imports triton (transformers and peft do), and `backend="triton"`. Its bfloat16 is wrong
and says nothing, so it is refused here.
"""

import os
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"] | None
DEVICES = ("cuda", "xpu")


@cache
def _triton_imports() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def uses_triton(tensor: Tensor, backend: Backend = None) -> bool:
    """True where `tensor` lies on a CUDA or XPU device and triton can be imported (and is not told
    to interpret). `backend` forces either way; ValueError where it asks for Triton and the kernels
    cannot run.
    """
    there = tensor.device.type in DEVICES
    if backend is None:
        return there and not _interpreted() and _triton_imports()
    if backend == "torch":
        return False
    if backend != "triton":
        raise ValueError(f"backend={backend!r}: take 'torch', 'triton' or None")
    if not _triton_imports():
        raise ValueError("backend='triton' needs triton: pip install 'mnemic[kernels]'")
    if not there and not _interpreted():
        raise ValueError(
            f"backend='triton' needs a CUDA or XPU tensor, found one on {tensor.device}; "
            "on a CPU, set TRITON_INTERPRET=1 before triton is imported"
        )
    if _interpreted() and tensor.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: take float16 or float32")
    return True


class TritonKernel:
    """A function in Triton's language, imported and compiled at its first launch."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function: Any = function

    @cached_property
    def compiled(self) -> Any:
        self.function.__globals__["tl"] = import_module("triton.language")
        # Triton reads `constexpr` off the annotations, which are strings until `tl` is there.
        self.function.__annotations__ = typing.get_type_hints(self.function)
        return import_module("triton").jit(self.function)

    def launch(self, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        """Run on the device of the first argument, a tensor; an empty grid does nothing."""
        if 0 in grid:
            return
        with _current(args[0]):
            self.compiled[grid](*args, **meta)


triton_kernel = TritonKernel


def _current(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type not in DEVICES:
        return nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is neither below `number` nor below `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())


def num_warps(block: int) -> int:
    """Warps for a program that holds `block` elements of a row: about 16 a thread."""
    return min(16, max(1, block // 512))


def check_index(hidden: Tensor, index: Tensor) -> None:
    """ValueError unless `hidden` is (B, S, H) and `index` int64 (B, K) beside it."""
    if hidden.dim() != 3 or index.dim() != 2 or hidden.shape[0] != index.shape[0]:
        raise ValueError(
            f"hidden must be (B, S, H) and index (B, K), found {tuple(hidden.shape)} "
            f"and {tuple(index.shape)}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"index must be int64, found {index.dtype}")
    if index.device != hidden.device:
        raise ValueError(f"index is on {index.device}, hidden on {hidden.device}")


def take_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """hidden[b, index[b, k]] (B, K, H) in torch, not differentiable. A sequence at a time, because
    index_select copies whole rows: torch.gather, element by element, took 5 to 16 times as long.
    """
    rows = hidden.new_empty(*index.shape, hidden.shape[2])
    for source, at, out in zip(hidden, index, rows, strict=True):
        torch.index_select(source, 0, at, out=out)
    return rows


def runs(index: Tensor) -> tuple[Tensor, Tensor]:
    """`index` (B, K) sorted in each row, and where each came from; both int64 (B, K), contiguous.

    Equal indices become neighbours, so one program can add up all that meet in a row: unlike
    atomics, in a fixed order, with one rounding, and in bfloat16 on any card.
    """
    ordered, order = index.sort(dim=1, stable=True)
    return ordered.contiguous(), order.contiguous()
