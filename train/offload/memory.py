"""Host memory of the engine: page-aligned buffers of exact size, and a heap that gives back.

A buffer is an anonymous private mapping: no rounding to a power of two (as torch's pinned allocator
does), aligned for direct I/O, returned to the system when it is dropped. On a CUDA machine it can
be registered, which makes it pinned memory of the same exact size.
"""

import ctypes
import logging
import mmap
import os

import torch
from torch import Tensor

log = logging.getLogger("mnemic")

ALIGN = 4096
"""Offsets, lengths and addresses of direct I/O are multiples of this."""

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def round_up(nbytes: int, unit: int = ALIGN) -> int:
    return -(-nbytes // unit) * unit


def aligned_buffer(nbytes: int, *, pin: bool = False) -> Tensor:
    """uint8 zeros of `nbytes` rounded up to a page, at a page boundary; `pin` registers them with
    CUDA.
    """
    size = max(ALIGN, round_up(nbytes))
    # Shared mappings would count as tmpfs and outlive a fork.
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer = torch.frombuffer(block, dtype=torch.uint8)
    if pin:
        runtime = torch.cuda.cudart()
        assert runtime is not None
        status = runtime.cudaHostRegister(buffer.data_ptr(), size, 0)
        if int(status) != 0:
            log.warning("cudaHostRegister of %d bytes failed (%s): copies will wait", size, status)
    return buffer


def bytes_of(buffer: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(buffer.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


_PRIMITIVES = "32"


def bound_kernels() -> None:
    """Keep few compiled matrix kernels on a CPU. Call it before the first product.

    oneDNN, and torch's cache over it, keep one with its buffers for each shape of a product, 1024
    of them by default: with rows of changing length that alone grew by 8 MiB a length (measured).
    32 hold the shapes of a layer.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _PRIMITIVES)


def settle_malloc() -> bool:
    """Keep resident memory at what is in use. Call it before large blocks are allocated.

    glibc is made to return large blocks to the system at once and to keep one arena: otherwise
    small lasting allocations between large temporary ones freeze the heap at its highest point, and
    what one thread has freed is of no use to another. False where the C library has no such
    setting, or the user has set it.
    """
    bound_kernels()
    if any(key.startswith("MALLOC_") for key in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_THRESHOLD: 1 << 18, _M_TRIM_THRESHOLD: 1 << 20, _M_ARENA_MAX: 1}
    return all(mallopt(key, value) == 1 for key, value in settings.items())
