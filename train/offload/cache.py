"""Slots of exact size over pieces of one class (layers; vocabulary tiles; state tiles).

Passes over layers go forward and then backward, so the least recently used slot is the one needed
last: with `slots` of n pieces a step reads 2 (n - slots), as if that many were pinned; and with a
slot for each, nothing is ever read again. The slot count is therefore the only knob of residency,
and it never changes a bit of the result.

On an accelerator each slot has a device buffer beside its host buffer; the content is moved when
the slot is taken (`acquire`) and when it is written back.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemic.train.offload.codec import Codec
from mnemic.train.offload.io import Transfer
from mnemic.train.offload.memory import aligned_buffer
from mnemic.train.offload.store import Store


@dataclass(slots=True, eq=False)
class Slot:
    host: Tensor
    device: Tensor
    piece: str | None = None
    read: Transfer | None = None
    write: Transfer | None = None
    pins: int = 0
    used: int = 0
    on_device: bool = False

    @property
    def apart(self) -> bool:
        """Whether host and device content are two buffers."""
        return self.host is not self.device


class Cache:
    """`slots` buffers of `nbytes` over pieces of `store`, none of which is larger.

    `device`: where `acquire` gives the content; `copy_to_device` makes that a second buffer even on
    the CPU, so that tests reach the path. `codecs`: pieces that are stored in another form.
    """

    def __init__(
        self, store: Store, nbytes: int, slots: int,
        device: torch.device | str = "cpu", copy_to_device: bool | None = None,
        codecs: Mapping[str, Codec] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.device, self.codecs = store, torch.device(device), codecs or {}
        self.apart = self.device.type != "cpu" if copy_to_device is None else copy_to_device
        stored = nbytes
        if self.codecs:
            # What is read is smaller than what it is decoded into.
            self.apart = True
            stored = max(codec.nbytes for codec in self.codecs.values())
        pin = self.device.type == "cuda"
        self.slots: list[Slot] = []
        for _ in range(slots):
            host = device_buffer = aligned_buffer(stored, pin=pin)
            if self.apart:
                whole = host if stored == nbytes else aligned_buffer(nbytes)
                device_buffer = torch.empty_like(whole, device=self.device)
            self.slots.append(Slot(host, device_buffer))
        self._at: dict[str, Slot] = {}
        self._clock = 0
        self.hits = self.misses = 0

    def _victim(self) -> Slot | None:
        free = [slot for slot in self.slots if slot.pins == 0]
        return min(free, key=lambda s: s.used) if free else None

    def prefetch(self, piece: str) -> None:
        """Begin to read `piece`, unless every slot is in use; if it is here already, it stays."""
        held = self._at.get(piece)
        if held is not None:
            # Reading further ahead must not take the slot of what is needed sooner.
            self._touch(held)
            return
        slot = self._victim()
        if slot is not None:
            self._load(slot, piece)

    def _load(self, slot: Slot, piece: str) -> None:
        self.misses += 1
        if slot.piece is not None:
            del self._at[slot.piece]
        self._touch(slot)
        slot.piece, slot.on_device = piece, False
        self._at[piece] = slot
        # A read that nobody took may still be filling the buffer: it comes first in its thread.
        after = [t for t in (slot.write, slot.read) if t is not None and not t.done]
        slot.write = None
        if self.store.written(piece):
            target = slot.host[: self.store.plan.pieces[piece].padded]
            slot.read = self.store.read(piece, target, after)
        else:
            for transfer in after:
                transfer.wait()
            slot.host.zero_()
            slot.read = None

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock

    def acquire(self, piece: str) -> Tensor:
        """The content of `piece` (uint8, on the device), pinned until `release`; waits for it."""
        slot = self._at.get(piece)
        if slot is None:
            slot = self._victim()
            assert slot is not None, "more pieces are held at once than there are slots"
            self._load(slot, piece)
        else:
            self.hits += 1
        slot.pins += 1
        self._touch(slot)
        if slot.read is not None:
            self._wait(slot.read, piece)
            slot.read = None
        if slot.apart and not slot.on_device:
            codec = self.codecs.get(piece)
            if codec is None:
                slot.device.copy_(slot.host, non_blocking=True)
            else:
                codec.decode(slot.host, slot.device)
        slot.on_device = True
        return slot.device

    def _wait(self, transfer: Transfer, piece: str) -> None:
        start = time.perf_counter()
        transfer.wait()
        if self.store.io.trace:
            self.store.io.trace.add("wait", piece, start)

    def release(self, piece: str) -> None:
        slot = self._at[piece]
        assert slot.pins > 0
        slot.pins -= 1

    def holds(self, piece: str) -> bool:
        return piece in self._at

    def write(self, piece: str) -> None:
        """Begin to write the slot's content back. It must not change before the next `settle`."""
        assert piece not in self.codecs, "an encoded base is frozen"
        slot = self._at[piece]
        if slot.apart:
            if slot.write is not None:
                slot.write.wait()
            slot.host.copy_(slot.device)  # blocks: the write must see all of it
        slot.write = self.store.write(piece, slot.host[: self.store.plan.pieces[piece].padded])

    def settle(self, piece: str) -> None:
        """Wait until the slot's last write is out, before its content is changed again."""
        slot = self._at[piece]
        if slot.write is not None:
            self._wait(slot.write, piece)
            slot.write = None

    def drop(self) -> None:
        """Forget all content (after a rollback)."""
        for slot in self.slots:
            assert slot.pins == 0
            for transfer in (slot.read, slot.write):
                if transfer is not None:
                    transfer.wait()
            slot.piece, slot.read, slot.write, slot.on_device = None, None, None, False
        self._at.clear()
