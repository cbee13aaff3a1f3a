"""What a streamed model is cut into: layers, row tiles of embedding and head, tiles of states.

    block/<l>        the weights of layer l, one after the other: one read a pass
    rest             what is neither layer nor vocabulary; always in memory
    rows/<w>/<t>     tile t of the rows of an embedding or head w
    state/<w>/<t>    optimizer state of a tile of a matrix, interleaved: one read, one write
    arena/<block>    the small states of a block (APOLLO's, those of vectors); always in memory

Tiling the vocabulary matrices makes the largest thing in memory one layer, not an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemic.optim.eightbit import BLOCK
from mnemic.train.offload.memory import round_up

TILE = 1 << 19
"""Elements in a tile: requests of 1 to 6 MiB, and buffers that are small beside a layer."""

_FIELD = 64  # alignment of tensors inside a piece, bytes


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor inside a piece: `offset` bytes from its start."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in `buffer` (uint8)."""
        flat = buffer[self.offset : self.offset + self.nbytes]
        return flat.view(self.dtype).view(self.shape)


def pack(
    tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
) -> tuple[list[Spec], int]:
    """Lay tensors (name, shape, dtype) out one after the other; specs, and the bytes of all."""
    specs, offset = [], 0
    for name, shape, dtype in tensors:
        spec = Spec(name, tuple(shape), dtype, offset)
        specs.append(spec)
        offset += round_up(spec.nbytes, _FIELD)
    return specs, offset


def rows_per_tile(rows: int, cols: int, elements: int = TILE) -> int:
    """Rows of a tile of a (rows, cols) matrix: whole rows, and whole blocks of one-byte states."""
    unit = BLOCK // _gcd(BLOCK, cols)
    return min(rows, unit * max(1, elements // (unit * cols)))


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


@dataclass(frozen=True, slots=True)
class Tiling:
    """A matrix (or stack of matrices, seen as rows) cut into tiles of whole rows."""

    name: str
    rows: int
    cols: int
    step: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], elements: int = TILE) -> "Tiling":
        cols = shape[-1] if len(shape) > 1 else 1
        rows = torch.Size(shape).numel() // cols
        return cls(name, rows, cols, rows_per_tile(rows, cols, elements))

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def slice(self, tile: int) -> slice:
        return slice(tile * self.step, min(self.rows, (tile + 1) * self.step))

    def numel(self, tile: int) -> int:
        part = self.slice(tile)
        return (part.stop - part.start) * self.cols
