"""Gradients on disk, for exact clipping: written as they come, read when their norm is known."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mnemic.train.offload.cache import Cache
from mnemic.train.offload.layout import Spec
from mnemic.train.offload.store import Piece, Store
from mnemic.train.offload.vocabulary import Matrix, Vocabulary


def gradient_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """A piece of gradients for each piece of weights: one extent, for no step outlives it."""
    return [Piece(f"grad/{piece.name}", piece.nbytes, 1) for piece in pieces]


class Spill:
    """`blocks`: the trained tensors of each layer and of the rest. Two slots for blocks, three for
    vocabulary tiles.
    """

    def __init__(self, store: Store, blocks: dict[str, list[Spec]], device: torch.device) -> None:
        self.store, self.blocks = store, blocks
        sizes = {name: piece.nbytes for name, piece in store.plan.pieces.items()}
        largest = max(v for k, v in sizes.items() if not k.startswith("grad/rows/"))
        rows = max((v for k, v in sizes.items() if k.startswith("grad/rows/")), default=0)
        self.cache = Cache(store, largest, 2, device)
        self.tile_cache = Cache(store, rows, 3, device) if rows else None
        self._buffer: Tensor | None = None
        self._specs: dict[str, Spec] = {}

    def begin(self, block: str) -> None:
        self._buffer = self._open(self.cache, f"grad/{block}")
        self._specs = {spec.name: spec for spec in self.blocks[block]}

    def _open(self, cache: Cache, piece: str) -> Tensor:
        buffer = cache.acquire(piece)
        cache.settle(piece)
        return buffer

    def put(self, name: str, grad: Tensor) -> None:
        assert self._buffer is not None
        self._specs[name].view(self._buffer).copy_(grad)

    def end(self, block: str) -> None:
        self.cache.write(f"grad/{block}")
        self.cache.release(f"grad/{block}")
        self._buffer = None

    def put_tile(self, matrix: Matrix, tile: int, grad: Tensor) -> None:
        cache, piece = self.tile_cache, f"grad/{matrix.piece(tile)}"
        assert cache is not None
        buffer = self._open(cache, piece)
        self._tile(matrix, tile, buffer).copy_(grad)
        cache.write(piece)
        cache.release(piece)

    def _tile(self, matrix: Matrix, tile: int, buffer: Tensor) -> Tensor:
        rows = matrix.tiling.numel(tile) // matrix.tiling.cols
        flat = buffer[: matrix.tiling.numel(tile) * matrix.param.dtype.itemsize]
        return flat.view(matrix.param.dtype).view(rows, matrix.tiling.cols)

    def gradients(self, block: str) -> Iterator[tuple[str, Tensor]]:
        """(name, gradient) of a block; copies, so that they may be changed and freed."""
        buffer = self.cache.acquire(f"grad/{block}")
        for spec in self.blocks[block]:
            yield spec.name, spec.view(buffer).clone()
        self.cache.release(f"grad/{block}")

    def tiles(
        self, matrix: Matrix, vocabulary: Vocabulary, skip: bool = False
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(tile, weight, gradient) of a vocabulary matrix, all of them whatever `skip` says."""
        del skip
        cache = self.tile_cache
        assert cache is not None
        for tile, weight in vocabulary.tiles(matrix):
            piece = f"grad/{matrix.piece(tile)}"
            buffer = cache.acquire(piece)
            yield tile, weight, self._tile(matrix, tile, buffer)
            cache.release(piece)
