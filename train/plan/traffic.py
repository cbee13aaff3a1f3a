"""What a streamed step reads and writes: its schedule, run over the engine's own caches on a store
that only counts.

Which slot a layer or a tile finds is the cache's business, so the cache itself is asked. What is
written is simpler: each trained piece once. Bytes are those of `Engine.io`, to the last one, for
the steps after the first two and token ids that are known; `ids` that are not are assumed to be
spread over the vocabulary, each token another one, which is the most they can cost.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.train.offload.cache import Cache
from mnemic.train.offload.engine import RING, Layout, Settings
from mnemic.train.offload.io import Transfer
from mnemic.train.offload.memory import ALIGN, round_up
from mnemic.train.offload.spill import gradient_pieces
from mnemic.train.offload.store import Piece
from mnemic.train.offload.vocabulary import Matrix


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step between memory and the store; gradients (clip: exact_spill) have files of
    their own.
    """

    read: int
    written: int
    gradients_read: int = 0
    gradients_written: int = 0


class _Ledger:
    """In the place of a `Store`: everything was written before, and nothing moves but numbers."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.plan = self.io = self
        self.trace = None
        self.pieces = {piece.name: piece for piece in pieces}
        self.read_bytes = self.written_bytes = 0

    def written(self, name: str) -> bool:
        return name in self.pieces

    def read(self, name: str, buffer: Tensor, after: Sequence[Transfer] = ()) -> Transfer:
        del buffer, after
        self.read_bytes += self.pieces[name].padded
        return Transfer([])

    def write(self, name: str, buffer: Tensor) -> Transfer:
        del buffer
        self.written_bytes += self.pieces[name].padded
        return Transfer([])


class _Schedule:
    """One step after the other, as `streamer.py`, `vocabulary.py` and `update.py` make them."""

    def __init__(self, layout: Layout, settings: Settings, ids: Tensor) -> None:
        self.layout, self.clip, self.full = layout, settings.clip, layout.applier is not None
        self.ids = ids.unique()
        self.ledger = _Ledger(p for p in layout.weight_pieces if p.name != "rest")
        self.layers = Cache(self._store(self.ledger), 1, layout.kept_layers)
        self.tiles = Cache(self._store(self.ledger), 1, layout.kept_tiles)
        self.embedding, self.head = layout.matrices[0], layout.matrices[-1]
        self.spilling = self.full and self.clip == "exact_spill"
        self.gradients = _Ledger(gradient_pieces(layout.weight_pieces) if self.spilling else [])
        self.gradient_blocks = Cache(self._store(self.gradients), 1, 2)
        self.gradient_tiles = Cache(self._store(self.gradients), 1, 3)

    def _store(self, ledger: _Ledger) -> Any:
        return ledger

    def step(self) -> None:
        count, in_sweep = len(self.layout.blocks), False
        self._rows()
        for index in range(count):
            self._layer(index, 1)
        self._sweep(self.head)
        if self.full:
            own = self.head is not self.embedding
            in_sweep = own and self.clip not in ("exact_spill", "layer")
        by_element = self.full and self._by_element(self.head)
        self._sweep(self.head, backwards=True, write=in_sweep and by_element)
        for index in reversed(range(count)):
            self._layer(index, -1, write=self.full and not self.spilling)
            self._gradient(f"block/{index}")
        if not self.full:
            return
        for matrix in self.layout.matrices:
            if not (matrix is self.head and in_sweep):
                self._update(matrix)
            elif not by_element:
                self._update(matrix, measured=True)
        self._gradient("rest")
        if self.spilling:
            self._apply_spilled()

    # Layers ----------------------------------------------------------------------------------

    def _layer(self, index: int, direction: int, *, write: bool = False) -> None:
        piece, count = f"block/{index}", len(self.layout.blocks)
        self.layers.acquire(piece)
        depth = 1 if len(self.layers.slots) < 4 else 2
        for ahead in (index + direction * (i + 1) for i in range(depth)):
            if 0 <= ahead < count:
                self.layers.prefetch(f"block/{ahead}")
        if write:
            self.layers.write(piece)
        self.layers.release(piece)

    # Vocabulary ------------------------------------------------------------------------------

    def _by_element(self, matrix: Matrix) -> bool:
        applier = self.layout.applier
        return applier is not None and applier.rules[matrix.name].form is not None

    def _sweep(
        self, matrix: Matrix, *, backwards: bool = False, write: bool = False,
        chosen: Sequence[int] | None = None, gradients: str = "",
    ) -> None:  # fmt: skip
        order: Sequence[int] = range(len(matrix.tiling)) if chosen is None else chosen
        order = order[::-1] if backwards else order
        for position, tile in enumerate(order):
            piece = matrix.piece(tile)
            self.tiles.acquire(piece)
            for ahead in order[position + 1 : position + 3]:
                self.tiles.prefetch(matrix.piece(ahead))
            if gradients:
                put = gradients == "put"
                self._take_gradient(self.gradient_tiles, f"grad/{piece}", write=put)
            if write:
                self.tiles.write(piece)
            self.tiles.release(piece)

    def _update(self, matrix: Matrix, *, measured: bool = False) -> None:
        if self.spilling:
            self._sweep(matrix, gradients="put")
            return
        # Tiles without a token have no gradient, unless the matrix is the head as well.
        used = None if matrix is self.head else self._used(matrix)
        if self.clip == "layer":
            self._sweep(matrix, chosen=used)
        if self._by_element(matrix):
            self._sweep(matrix, write=True)
            return
        if not measured:
            self._sweep(matrix, chosen=used)
        assert self.layout.applier is not None
        decays = self.layout.applier.steps.group(matrix.param)["weight_decay"] > 0
        self._sweep(matrix, write=True, chosen=None if decays else used)

    def _used(self, matrix: Matrix) -> list[int]:
        return (self.ids // matrix.tiling.step).unique().tolist()

    def _rows(self) -> None:
        """Embedding rows of the batch: whole tiles, or where few rows are wanted, their pages."""
        matrix, tiling = self.embedding, self.embedding.tiling
        width = tiling.cols * matrix.param.dtype.itemsize
        places = self.ids // tiling.step
        tiles, counts = (x.tolist() for x in places.unique(return_counts=True))
        for position, (tile, count) in enumerate(zip(tiles, counts, strict=True)):
            piece = matrix.piece(tile)
            sparse = count * (width + 2 * ALIGN) * 2 < tiling.step * width
            if sparse and not self.tiles.holds(piece):
                limit = self.ledger.pieces[piece].padded
                for row in (self.ids[places == tile] - tile * tiling.step).tolist():
                    stop = min(limit, round_up((row + 1) * width))
                    self.ledger.read_bytes += stop - row * width // ALIGN * ALIGN
                continue
            self.tiles.acquire(piece)
            for ahead in tiles[position + 1 : position + 2]:
                self.tiles.prefetch(matrix.piece(ahead))
            self.tiles.release(piece)

    # Spilled gradients -----------------------------------------------------------------------

    def _gradient(self, block: str, *, write: bool = True) -> None:
        if self.spilling and self.gradients.written(f"grad/{block}"):
            self._take_gradient(self.gradient_blocks, f"grad/{block}", write=write)

    def _take_gradient(self, cache: Cache, piece: str, *, write: bool) -> None:
        cache.acquire(piece)
        if write:
            cache.write(piece)
        cache.release(piece)

    def _apply_spilled(self) -> None:
        for matrix in self.layout.matrices:
            if not self._by_element(matrix):
                self._sweep(matrix, gradients="get")
            self._sweep(matrix, write=True, gradients="get")
        for index in range(len(self.layout.blocks)):
            self._layer(index, 1, write=True)
            self._gradient(f"block/{index}", write=False)
        self._gradient("rest", write=False)


def traffic(layout: Layout, settings: Settings, ids: Tensor) -> Traffic:
    """Bytes of one step in the steady state. `ids`: the step's token ids (N,)."""
    schedule = _Schedule(layout, settings, ids)
    counted = [schedule.ledger, schedule.gradients]
    for _ in range(3):
        for ledger in counted:
            ledger.read_bytes = ledger.written_bytes = 0
        schedule.step()
    read, written = schedule.ledger.read_bytes, schedule.ledger.written_bytes
    if layout.applier is not None:
        # Rest, small states and state tiles are written once each; tiles are also read, unless
        # they stay in memory.
        own = set(schedule.ledger.pieces)
        written += sum(p.padded for p in layout.pieces if p.name not in own)
        kept = {piece.name for piece in layout.kept_states}
        moved = [p for p in layout.pieces if p.name.startswith("state/") and p.name not in kept]
        read += sum(p.padded for p in moved) if len(moved) > RING else 0
    return Traffic(read, written, schedule.gradients.read_bytes, schedule.gradients.written_bytes)


def spread_ids(tokens: int, vocabulary: int) -> Tensor:
    """Ids of `tokens` tokens of which as few as possible are alike."""
    count = max(1, min(tokens, vocabulary))
    return torch.arange(count) * vocabulary // count
