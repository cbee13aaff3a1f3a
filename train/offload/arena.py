"""One preallocated buffer for every small optimizer state: APOLLO's, those of vectors, step counts.

Small states allocated one by one between large temporary tensors freeze the heap at its highest
point (half a gigabyte at 232 M parameters, measured). Here they are views into one buffer, laid out
by block, so that a block's states are written with its weights, in one request.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mnemic.train.offload.io import Transfer
from mnemic.train.offload.layout import Spec, pack
from mnemic.train.offload.memory import aligned_buffer, round_up
from mnemic.train.offload.store import Piece, Store

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Arena:
    """`blocks`: block name -> {tensor key: (shape, dtype)}. Everything starts as zeros."""

    def __init__(self, blocks: Mapping[str, Shapes]) -> None:
        self._specs: dict[str, list[Spec]] = {}
        self._at: dict[str, tuple[int, int]] = {}
        offset = 0
        for block, shapes in blocks.items():
            specs, nbytes = pack([(key, shape, dtype) for key, (shape, dtype) in shapes.items()])
            self._specs[block], self._at[block] = specs, (offset, round_up(nbytes))
            offset += round_up(nbytes)
        self.nbytes = offset
        self.buffer = self._host = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}

    def allocate(self, device: torch.device | str = "cpu", apart: bool = False) -> None:
        """On `device`; where that is not the host (or `apart`), with a host copy to write from."""
        device = torch.device(device)
        self._host = self.buffer = aligned_buffer(self.nbytes, pin=device.type == "cuda")
        if apart or device.type != "cpu":
            self.buffer = torch.zeros_like(self._host, device=device)
        self._views = {
            spec.name: spec.view(self._part(block))
            for block, specs in self._specs.items()
            for spec in specs
        }

    def pieces(self, copies: int) -> list[Piece]:
        return [Piece(f"arena/{b}", n, copies) for b, (_, n) in self._at.items() if n]

    def _part(self, block: str) -> Tensor:
        offset, nbytes = self._at[block]
        return self.buffer[offset : offset + nbytes]

    def _host_part(self, block: str) -> Tensor:
        offset, nbytes = self._at[block]
        return self._host[offset : offset + nbytes]

    def view(self, key: str) -> Tensor:
        return self._views[key]

    def write(self, block: str, store: Store) -> None:
        """Begin to write a block's states; they must not change before the store is flushed."""
        if not self._at[block][1]:
            return
        if self._host is not self.buffer:
            self._host_part(block).copy_(self._part(block))
        store.write(f"arena/{block}", self._host_part(block))

    def load(self, store: Store) -> None:
        """Read everything back; what was never written becomes zeros."""
        transfers: list[Transfer] = []
        for block, (_, nbytes) in self._at.items():
            if not nbytes:
                continue
            if store.written(f"arena/{block}"):
                transfers.append(store.read(f"arena/{block}", self._host_part(block)))
            else:
                self._host_part(block).zero_()
        for transfer in transfers:
            transfer.wait()
        if self._host is not self.buffer:
            self.buffer.copy_(self._host)
